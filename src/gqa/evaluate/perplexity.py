"""Cross-entropy of a model on windows of text."""

# B windows, T tokens of a window, V entries of the vocabulary

from __future__ import annotations

import math

import torch

from gqa.errors import GqaError

ROWS = 1024  # predictions per piece: a log-softmax in fp32 over a vocabulary of 128k takes 0.5 GiB for these


def token_losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each predicted token, in nats.

    `loss_bt = -log softmax(logits[b, t])[ids[b, t+1]]`; the first token of a window is context only.
    logits (B, T, V), ids (B, T) -> (B, T - 1) float64. The log-softmax is taken in fp32, or in the logits' own fp64.
    """
    B, T = ids.shape
    targets = ids[:, 1:].reshape(-1, 1)
    rows = logits[:, :-1].reshape(-1, logits.shape[-1])
    losses = [
        -log_softmax(piece).gather(1, target).squeeze(1).double()
        for piece, target in zip(rows.split(ROWS), targets.split(ROWS), strict=True)
    ]
    return torch.cat(losses).reshape(B, T - 1)


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (..., V), never below fp32."""
    return torch.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def mean_and_error(values: torch.Tensor) -> tuple[float, float | None]:
    """Mean over windows, and its standard error `std / sqrt(N)`; None for a single window.

    The window is the unit that counts as independent: the tokens inside one share their context and their topic, so
    an error computed over tokens would be too small.
    """
    count = len(values)
    error = values.std().item() / math.sqrt(count) if count > 1 else None
    return values.mean().item(), error


def paired_p_value(differences: torch.Tensor, flips: int = 9999) -> float | None:
    """How likely a mean difference this far from zero is, if neither of a pair were the better one; None for one pair.

    A sign-flip test: under that assumption every difference may as well have the other sign. The share of random
    choices of signs whose mean is as far from zero, the true one included; seeded. differences (N,).
    """
    if len(differences) < 2:
        return None
    values = differences.double().cpu()
    generator = torch.Generator().manual_seed(0)
    as_far, size = 1, values.mean().abs() * (1 - 1e-12)
    for piece in torch.randint(0, 2, (flips, len(values)), generator=generator, dtype=torch.int8).split(1024):
        signs = 1 - 2 * piece.double()
        as_far += int(((signs @ values / len(values)).abs() >= size).sum())
    return as_far / (flips + 1)


def perplexity(nats_per_token: float) -> float:
    """`exp(cross-entropy)`; infinite where that overflows."""
    return math.exp(nats_per_token) if nats_per_token < 700 else math.inf


def check_windows(windows, vocabulary: int, name: str) -> torch.Tensor:
    """Windows (N, T) of token ids as a tensor, or a GqaError if a model of this vocabulary cannot read them."""
    ids = torch.as_tensor(windows, dtype=torch.int64)
    if ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise GqaError("windows have the wrong shape", got=tuple(ids.shape), allowed="(1 or more, 2 tokens or more)")
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise GqaError(
            f"the text has token ids that {name} does not know",
            got=f"ids from {int(ids.min())} to {int(ids.max())}",
            allowed=f"0 to {vocabulary - 1}",
            hint="use the tokenizer of the model itself",
        )
    return ids
