"""Small real models made for tests."""

import dataclasses

import helpers.heads as heads_made
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gqa.config import child_config, parse_config
from gqa.convert import heads
from gqa.weights.layout import TensorsInMemory, load_layout

# What a config says in the spelling of transformers 4 beside today's.
_OLD = ("rope_theta", "rope_scaling", "torch_dtype")


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
    """Every layer's attention as AttentionWeights, by the layout's own names."""
    layout = load_layout(model.config.model_type, model.config.to_dict())
    for layer in range(model.config.num_hidden_layers):
        yield layer, layout, layout.read_attention(TensorsInMemory(model.state_dict()), layer)


def as_scrambled_mha(model, *, shuffle=True, turn=True, rows="invertible", seed=0):
    """The multi-head model that computes the same as a grouped-query one: every KV head repeated for each of its
    query heads, each copy turned by maps that leave its function alone, and the heads in another order."""
    generator = torch.Generator().manual_seed(seed)
    raw = model.config.to_dict()
    shape = parse_config(raw, "tiny").layers[0]
    H, G = shape.query_heads, shape.query_heads // shape.kv_heads
    multi = dataclasses.replace(shape, kv_heads=H)
    config = type(model.config)(**{key: value for key, value in child_config(raw, H).items() if key not in _OLD})
    state = dict(model.state_dict())
    for layer, layout, weights in attention_layers(model):
        grouped = heads.split(weights, shape, layout)
        repeated = {"q": one_each(grouped.q), "o": one_each(grouped.o)}
        repeated |= {name: getattr(grouped, name).repeat_interleave(G, 0) for name in ("k", "v")}
        if grouped.sinks is not None:
            repeated["sinks"] = one_each(grouped.sinks)
        if grouped.q_norm is not None and grouped.k_norm is not None:
            repeated |= {"q_norm": one_each(grouped.q_norm), "k_norm": grouped.k_norm.repeat_interleave(G, 0)}
        order = torch.randperm(H, generator=generator).tolist() if shuffle else list(range(H))
        multiplied = dataclasses.replace(grouped, **repeated).select(order)
        scrambled = heads_made.scramble(multiplied, generator, rows=rows) if turn else multiplied
        state.update(layout.attention_tensors(layer, heads.join(scrambled, weights, multi, layout)))
    child = type(model)(config).to(next(model.parameters()).dtype).eval()
    child.load_state_dict(state)
    return child


def one_each(tensor):
    """What belongs to (H, G) query heads, as belongs to (H * G, 1)."""
    return tensor.flatten(0, 1)[:, None]
