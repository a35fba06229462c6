"""The training loss: the parent's predictions as targets, beside the text's own next tokens."""

# B windows, T tokens of a window, V entries of the vocabulary, K of them that a stored prediction names

from __future__ import annotations

import dataclasses

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax


@dataclasses.dataclass(frozen=True)
class TopPredictions:
    """A parent's K most likely next tokens after each of B windows' first T - 1.

    ids (B, T - 1, K); log_probabilities (B, T - 1, K + 1): of these, and last that of all the other tokens together.
    """

    ids: torch.Tensor
    log_probabilities: torch.Tensor


def top_predictions(logits: torch.Tensor, k: int) -> TopPredictions:
    """The K most likely of logits (B, T, V), in fp32; the last token of a window predicts nothing that is known."""
    log_probabilities = log_softmax(logits[:, :-1], dim=-1, dtype=torch.float32)
    top, ids = log_probabilities.topk(k, dim=-1)
    rest = log_probabilities.scatter(-1, ids, float("-inf")).logsumexp(-1, keepdim=True)
    return TopPredictions(ids, torch.cat([top, rest], dim=-1))


def distillation_loss(
    logits: torch.Tensor,
    ids: torch.Tensor,
    teacher: torch.Tensor | TopPredictions | None,
    weight: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`w * KL(teacher || student) + (1 - w) * cross-entropy`, both means in nats per predicted token.

    logits (B, T, V), ids (B, T), teacher: logits (B, T, V), or its K most likely tokens: the KL is then between
    distributions over K + 1 outcomes, all other tokens being one. Without a teacher the loss is the cross-entropy
    alone. Returns (loss, cross-entropy, KL or None), scalars; the latter two are detached. Hinton et al. 2015
    (arXiv 1503.02531) at temperature 1, as a converted model begins close to its parent.
    """
    rows = logits[:, :-1].flatten(0, 1)
    if isinstance(teacher, torch.Tensor):
        teacher = teacher[:, :-1].flatten(0, 1)
    return rows_loss(rows, ids[:, 1:].flatten(), teacher, weight)


def rows_loss(
    logits: torch.Tensor, following: torch.Tensor, teacher: torch.Tensor | TopPredictions | None, weight: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`distillation_loss` of R predictions: logits (R, V), the tokens that followed (R,), teacher: logits (R, V)."""
    student = log_softmax(logits, dim=-1, dtype=torch.float32)
    entropy = cross_entropy(student, following)  # of log-probabilities: they are their own log-softmax
    if teacher is None:
        return entropy, entropy.detach(), None
    if isinstance(teacher, TopPredictions):
        student, target = _outcomes(student, teacher)
    else:
        target = log_softmax(teacher, dim=-1, dtype=torch.float32)
    kl = kl_div(student, target, reduction="batchmean", log_target=True)
    return weight * kl + (1 - weight) * entropy, entropy.detach(), kl.detach()


def _outcomes(student: torch.Tensor, teacher: TopPredictions) -> tuple[torch.Tensor, torch.Tensor]:
    """Both distributions over the teacher's K tokens and the rest: log-probabilities, (B * (T - 1), K + 1) each."""
    ids, target = teacher.ids.flatten(0, 1), teacher.log_probabilities.flatten(0, 1)
    named = student.gather(1, ids)
    if ids.shape[1] == student.shape[1]:  # there is no rest: its logarithm would have no gradient
        return named, target[:, :-1]
    rest = student.scatter(1, ids, float("-inf")).logsumexp(1, keepdim=True)
    return torch.cat([named, rest], dim=1), target
