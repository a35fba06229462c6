"""The training loss: the parent's predictions as targets, beside the text's own next tokens."""

# B windows, T tokens of a window, V entries of the vocabulary

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax


def distillation_loss(
    logits: torch.Tensor,
    ids: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    weight: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`w * KL(teacher || student) + (1 - w) * cross-entropy`, both means in nats per predicted token.

    logits and teacher_logits (B, T, V), ids (B, T); without a teacher the loss is the cross-entropy alone.
    Returns (loss, cross-entropy, KL or None), scalars; the latter two are detached. Hinton et al. 2015
    (arXiv 1503.02531) at temperature 1, as a converted model begins close to its parent.
    """
    student = log_softmax(logits[:, :-1].flatten(0, 1), dim=-1, dtype=torch.float32)
    entropy = cross_entropy(student, ids[:, 1:].flatten())  # of log-probabilities: they are their own log-softmax
    if teacher_logits is None:
        return entropy, entropy.detach(), None
    teacher = log_softmax(teacher_logits[:, :-1].flatten(0, 1), dim=-1, dtype=torch.float32)
    kl = kl_div(student, teacher, reduction="batchmean", log_target=True)
    return weight * kl + (1 - weight) * entropy, entropy.detach(), kl.detach()
