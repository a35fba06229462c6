"""How many parameters a shape has. None where the config or the model type does not tell.

Letters: H KV heads, G queries per KV head, D head dim of q and k, Dv head dim of v, L layers.
"""

from __future__ import annotations

from gqa.config import Details, LayerShape, ModelShape


def attention_parameters(shape: ModelShape) -> int | None:
    """Weights and biases of the q, k, v and o projections of all layers; None for an unknown model type.

    Per layer hidden * (H*G*D + H*(D + Dv) + H*G*Dv), plus the biases; norms of q and k and sinks are not counted.
    Under latent attention the down- and up-projections of arXiv 2405.04434, section 2.1.
    """
    if shape.details is None:
        return None
    kv = kv_projection_parameters(shape)
    assert kv is not None  # known whenever details are
    return kv + sum(_query_and_output(shape, layer, shape.details) for layer in shape.layers)


def kv_projection_parameters(shape: ModelShape) -> int | None:
    """Weights and biases of the k and v projections of all layers: the part that the dial shrinks."""
    details = shape.details
    if details is None:
        return None
    if latent := shape.latent:
        down = shape.hidden * (latent.kv_rank + latent.rope_dim)
        up = latent.kv_rank * shape.query_heads * (latent.nope_dim + latent.v_dim)
        return len(shape.layers) * (down + up)
    width = sum(layer.kv_heads * (layer.head_dim + layer.v_head_dim) for layer in shape.layers)
    return width * (shape.hidden + details.qkv_bias)


def total_parameters(shape: ModelShape) -> int | None:
    """All parameters: embeddings, layers, norms. A tied output matrix counts once."""
    body = _body_parameters(shape, shape.experts.total if shape.experts else 0)
    if body is None or shape.details is None or shape.vocab is None or shape.tied_embeddings is None:
        return None
    if shape.details.positions and shape.context is None:
        return None
    positions = shape.context * shape.hidden if shape.details.positions and shape.context else 0
    matrices = 1 if shape.tied_embeddings else 2
    return round(body) + matrices * shape.vocab * shape.hidden + positions


def active_parameters(shape: ModelShape) -> int | None:
    """Parameters that multiply one token: a token's own experts, the output matrix, no lookup in an embedding."""
    read = read_parameters(shape, tokens=None)
    return None if read is None else round(read)


def output_parameters(shape: ModelShape) -> int | None:
    """The output matrix, whether or not it is the input embedding, too."""
    return None if shape.vocab is None else shape.vocab * shape.hidden


def read_parameters(shape: ModelShape, tokens: int | None) -> float | None:
    """Parameters that one step over `tokens` tokens reads from memory; of a mixture, the expected number.

    With k of E experts chosen evenly and independently per token, B tokens meet E * (1 - (1 - k/E)**B) of them.
    tokens=None counts one token's experts. Input embeddings are looked up, not read.
    """
    met = 0.0
    if experts := shape.experts:
        missed = (1 - experts.per_token / experts.total) ** (1 if tokens is None else tokens)
        met = experts.total * (1 - missed)
    body = _body_parameters(shape, met)
    if body is None or shape.vocab is None:
        return None
    return body + shape.vocab * shape.hidden


def _body_parameters(shape: ModelShape, experts_counted: float) -> float | None:
    """Everything between the embeddings, with `experts_counted` experts in each mixture."""
    details, attention = shape.details, attention_parameters(shape)
    if details is None or attention is None or shape.intermediate is None:
        return None
    mixtures = shape.experts.layers if shape.experts else 0
    dense = (len(shape.layers) - mixtures) * _mlp(shape, details, shape.intermediate)
    mixture = mixtures * _mixture(shape, details, experts_counted) if shape.experts else 0
    norms = (len(shape.layers) * details.norms + 1) * shape.hidden * (1 + details.norm_bias)
    inner = sum(_inner_norms(shape, layer, details) for layer in shape.layers)
    return attention + dense + mixture + norms + inner


def _query_and_output(shape: ModelShape, layer: LayerShape, details: Details) -> int:
    if latent := shape.latent:
        width = layer.query_heads * (latent.nope_dim + latent.rope_dim)
        rank = latent.q_rank
        query = shape.hidden * width if rank is None else rank * (shape.hidden + width)
        return query + layer.query_heads * latent.v_dim * shape.hidden
    query = layer.query_heads * layer.head_dim * (shape.hidden + details.qkv_bias)
    output = layer.query_heads * layer.v_head_dim * shape.hidden + details.o_bias * shape.hidden
    return query + output


def _mlp(shape: ModelShape, details: Details, width: int) -> int:
    inward = 2 if details.gated else 1
    weights = (inward + 1) * shape.hidden * width
    return weights + details.mlp_bias * (inward * width + shape.hidden)


def _mixture(shape: ModelShape, details: Details, experts_counted: float) -> float:
    experts = shape.experts
    assert experts is not None
    inward = 2 if details.gated else 1
    one = (inward + 1) * shape.hidden * experts.intermediate
    one += details.expert_bias * (inward * experts.intermediate + shape.hidden)
    router = experts.total * (shape.hidden + details.expert_bias)
    shared = (inward + 1) * shape.hidden * experts.shared_intermediate
    return experts_counted * one + router + shared


def _inner_norms(shape: ModelShape, layer: LayerShape, details: Details) -> int:
    """Norms inside the attention and the sinks' logits."""
    count = layer.query_heads * details.sinks
    if latent := shape.latent:
        count += (latent.q_rank or 0) + latent.kv_rank
    if details.qk_norm == "head":
        count += 2 * layer.head_dim
    elif details.qk_norm == "width":
        count += (layer.query_heads + layer.kv_heads) * layer.head_dim
    return count
