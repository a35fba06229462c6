"""One pass over windows of text: a model's cross-entropy and, beside its parent, what it lost."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gqa.errors import GqaError
from gqa.evaluate.fidelity import window_fidelity
from gqa.evaluate.perplexity import check_windows, mean_and_error, paired_p_value, perplexity, token_losses
from gqa.evaluate.position import by_position
from gqa.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclasses.dataclass(frozen=True)
class ParentLogits:
    """A parent's logits (N, T, V) on the windows `ids` (N, T), as `remember` makes them."""

    ids: torch.Tensor
    logits: torch.Tensor


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel,
    windows: np.ndarray,
    parent: PreTrainedModel | ParentLogits | None = None,
    batch: int = 8,
    progress: Progress = silent,
    *,
    positions: bool = False,
) -> dict[str, Any]:
    """Measure a loaded model on windows of token ids (N, T).

    Returns windows, tokens (predicted ones: N * (T - 1)), cross_entropy_nats_per_token, standard_error_nats,
    perplexity; with a parent also kl_to_parent_nats (mean KL(parent || model) per token) and its standard error,
    top1_agreement (share of positions where both rank the same token first), parent_cross_entropy_nats_per_token,
    parent_perplexity, loss_above_parent_nats and its standard error. That difference is paired, window by window, so
    its error is much smaller than those of the two cross-entropies; loss_above_parent_p_value is that of a sign-flip
    test of it. All standard errors are over windows. positions: also by_position, the figures over the context that a
    token has before it, as `gqa.evaluate.position.by_position` gives them.

    Raises GqaError for ids outside a vocabulary and for a parent of another vocabulary.
    """
    ids = check_windows(windows, model.config.get_text_config().vocab_size, "the model")
    if batch < 1:
        raise GqaError("a batch is not positive", got=batch, allowed="1 or more")
    if isinstance(parent, ParentLogits):
        assert torch.equal(parent.ids, ids), "the parent's logits are of other windows"
    losses, parent_losses, kls, agreements = [], [], [], []
    with _eval_mode(model):
        for start in range(0, len(ids), batch):
            piece = ids[start : start + batch]
            logits = _logits(model, piece)
            here = piece.to(logits.device)
            losses.append(token_losses(logits, here).cpu())
            if parent is not None:
                parent_logits = _parent_logits(parent, piece, start).to(logits.device)
                if parent_logits.shape != logits.shape:
                    raise GqaError(
                        "the parent has another vocabulary than the model",
                        got=f"{parent_logits.shape[-1]} entries",
                        allowed=f"{logits.shape[-1]} entries",
                    )
                kl, same = window_fidelity(logits, parent_logits)
                parent_losses.append(token_losses(parent_logits, here).cpu())
                kls.append(kl.cpu())
                agreements.append(same.cpu())
            progress("evaluating", min(start + batch, len(ids)), len(ids))

    of_tokens = torch.cat(losses)
    loss = of_tokens.mean(1)
    mean, error = mean_and_error(loss)
    results: dict[str, Any] = {
        "windows": len(ids),
        "tokens": ids.shape[0] * (ids.shape[1] - 1),
        "cross_entropy_nats_per_token": mean,
        "standard_error_nats": error,
        "perplexity": perplexity(mean),
    }
    if parent is not None:
        parent_loss = torch.cat(parent_losses).mean(1)
        parent_mean = parent_loss.mean().item()
        results["parent_cross_entropy_nats_per_token"] = parent_mean
        results["parent_perplexity"] = perplexity(parent_mean)
        results["kl_to_parent_nats"], results["kl_standard_error_nats"] = mean_and_error(torch.cat(kls))
        results["top1_agreement"] = torch.cat(agreements).mean().item()
        difference, difference_error = mean_and_error(loss - parent_loss)
        results["loss_above_parent_nats"] = difference
        results["loss_above_parent_standard_error_nats"] = difference_error
        results["loss_above_parent_p_value"] = paired_p_value(loss - parent_loss)
    if positions:
        results["by_position"] = by_position(of_tokens, torch.cat(parent_losses) if parent is not None else None)
    return results


@torch.inference_mode()
def remember(parent: PreTrainedModel, windows: np.ndarray, batch: int = 8) -> ParentLogits:
    """Compute the parent's logits once, to compare many children with it on the same windows. They take
    N * T * V * 4 bytes (256 MiB for 128 windows of 256 tokens and 2048 entries): for small vocabularies only."""
    ids = check_windows(windows, parent.config.get_text_config().vocab_size, "the parent")
    with _eval_mode(parent):
        return ParentLogits(ids, torch.cat([_logits(parent, piece).cpu() for piece in ids.split(batch)]))


@contextlib.contextmanager
def _eval_mode(model: Any) -> Iterator[None]:
    """Without dropout meanwhile; the model is handed back in the mode it came in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _parent_logits(parent: PreTrainedModel | ParentLogits, piece: torch.Tensor, start: int) -> torch.Tensor:
    if isinstance(parent, ParentLogits):
        return parent.logits[start : start + len(piece)]
    with _eval_mode(parent):
        return _logits(parent, piece)


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids.to(model.device), use_cache=False).logits
