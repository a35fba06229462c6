"""Small real models made for tests."""

import copy

import torch
from helpers.heads import scramble
from transformers import LlamaConfig, LlamaForCausalLM

from gqa.config import parse_config
from gqa.convert import heads
from gqa.weights.layout import load_layout


def tiny_llama(kv_heads=2, query_heads=8, *, layers=2, bias=False, tied=False, dtype=torch.float64, seed=0):
    """A random Llama, with weights large enough that attention is far from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=layers,
        num_attention_heads=query_heads,
        num_key_value_heads=kv_heads,
        head_dim=12,
        max_position_embeddings=64,
        attention_bias=bias,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).to(dtype=dtype).eval()  # type: ignore[call-overload]
    with torch.no_grad():  # transformers starts biases at zero, which would test nothing
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.2)
    return model


def attention_layers(model):
    """Every layer's attention projections as AttentionWeights, by the layout's own names."""
    layout = load_layout(model.config.model_type)
    state = model.state_dict()
    for layer in range(model.config.num_hidden_layers):
        fields = ("q", "k", "v", "o", "q_bias", "k_bias", "v_bias", "o_bias")
        yield layer, layout, {field: state.get(layout.tensor_name(layer, field)) for field in fields}


def as_scrambled_mha(model, *, shuffle=True, seed=0):
    """The multi-head model that computes the same as a grouped-query one: every KV head repeated for each of its
    query heads, each copy turned by maps that leave its function alone, and the heads in another order."""
    from gqa.weights.layout import AttentionWeights

    generator = torch.Generator().manual_seed(seed)
    shape = parse_config(model.config.to_dict(), "tiny").layers[0]
    config = copy.deepcopy(model.config)
    config.num_key_value_heads = H = shape.query_heads
    state = model.state_dict()
    for layer, layout, fields in attention_layers(model):
        weights = AttentionWeights(**fields)
        grouped = heads.split(weights, shape)
        G = shape.query_heads // shape.kv_heads
        repeated = heads.Heads(
            grouped.q.reshape(H, 1, *grouped.q.shape[2:]),
            grouped.k.repeat_interleave(G, 0),
            grouped.v.repeat_interleave(G, 0),
            grouped.o.reshape(H, 1, *grouped.o.shape[2:]),
        )
        order = torch.randperm(H, generator=generator).tolist() if shuffle else list(range(H))
        turned = scramble(repeated.select(order), generator)
        state.update(layout.attention_tensors(layer, heads.join(turned, weights)))
    child = type(model)(config).to(next(model.parameters()).dtype).eval()
    child.load_state_dict(state)
    return child
