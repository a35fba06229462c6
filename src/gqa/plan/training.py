"""What training takes: memory of the states, and work per token."""

from __future__ import annotations

from gqa.config import ModelShape
from gqa.plan.flops import prefill_work
from gqa.plan.parameters import total_parameters

# Mixed precision with Adam: weights and gradients in 2 bytes each, a master copy and two moments in 4 each
# (Rajbhandari et al. 2020, arXiv 1910.02054, section 3.1).
STATE_BYTES_PER_PARAMETER = 16


def training_state_bytes(shape: ModelShape) -> int | None:
    """Bytes of weights, gradients and Adam's states in mixed precision; activations come on top."""
    parameters = total_parameters(shape)
    return None if parameters is None else STATE_BYTES_PER_PARAMETER * parameters


def training_flops_per_token(shape: ModelShape, context: int) -> float | None:
    """Three times the forward pass over a window of S tokens, divided by S; every token goes through the output matrix.

    The backward pass does twice the forward's work (Kaplan et al. 2020, arXiv 2001.08361, section 2.1)."""
    work = prefill_work(shape, context, 1)
    if work is None or shape.vocab is None:
        return None
    return 3 * (work.total + 2 * (context - 1) * shape.vocab * shape.hidden) / context
