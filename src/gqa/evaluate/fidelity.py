"""How far a model's predictions are from its parent's."""

# B windows, T tokens of a window, V entries of the vocabulary

from __future__ import annotations

import torch

from gqa.evaluate.perplexity import ROWS, log_softmax


def window_fidelity(logits: torch.Tensor, parent_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per window: the mean KL divergence from the parent in nats per token, and how often both name the same token.

    `KL_b = 1/(T-1) * sum_t sum_v p(v) (log p(v) - log q(v))` with p the parent and q the model: what is lost when the
    model's predictions stand in for the parent's. Over the same T - 1 positions as the cross-entropy.
    logits and parent_logits (B, T, V) -> (B,), (B,) float64.
    """
    B, T, V = logits.shape
    kl, same = [], []
    rows = logits[:, :-1].reshape(-1, V).split(ROWS)
    parent_rows = parent_logits[:, :-1].reshape(-1, V).split(ROWS)
    for piece, parent_piece in zip(rows, parent_rows, strict=True):
        log_q, log_p = log_softmax(piece), log_softmax(parent_piece)
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1).double())
        same.append((log_q.argmax(-1) == log_p.argmax(-1)).double())
    return torch.cat(kl).reshape(B, T - 1).mean(1), torch.cat(same).reshape(B, T - 1).mean(1)
