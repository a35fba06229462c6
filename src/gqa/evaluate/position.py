"""Cross-entropy over how much context a token has: where a gap to the parent widens, it shows here."""

from __future__ import annotations

from typing import Any

import torch

from gqa.evaluate.perplexity import mean_and_error, perplexity


def by_position(losses: torch.Tensor, parent_losses: torch.Tensor | None = None) -> list[dict[str, Any]]:
    """Losses (N, T - 1) of tokens with 1 to T - 1 tokens before them, in ranges that double: 1, 2-3, 4-7, ...

    Rows: context_from and context_to, cross_entropy_nats_per_token, its standard error over windows and perplexity;
    with the parent's losses also its perplexity, loss_above_parent_nats and the standard error of that, paired.
    """
    rows = []
    first, last = 1, losses.shape[1]
    while first <= last:
        to = min(2 * first - 1, last)
        piece = losses[:, first - 1 : to].mean(1)
        mean, error = mean_and_error(piece)
        row: dict[str, Any] = {
            "context_from": first,
            "context_to": to,
            "cross_entropy_nats_per_token": mean,
            "standard_error_nats": error,
            "perplexity": perplexity(mean),
        }
        if parent_losses is not None:
            parent = parent_losses[:, first - 1 : to].mean(1)
            row["parent_perplexity"] = perplexity(parent.mean().item())
            row["loss_above_parent_nats"], row["loss_above_parent_standard_error_nats"] = mean_and_error(piece - parent)
        rows.append(row)
        first = to + 1
    return rows
