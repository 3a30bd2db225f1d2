"""How far a student's outputs are from a teacher's. c: classes, t: tokens, h: features of a hidden state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def softened_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`τ² KL(softmax(teacher / τ) ‖ softmax(student / τ))` for each row of logits.

    The factor τ² keeps the size of the gradient, which would fall with its inverse.

    Args:
        student: Logits `[..., c]`.
        teacher: Logits `[..., c]` of the same inputs.
        temperature: `τ > 0`; above 1 the smaller probabilities count for more.

    Returns:
        Divergences `[...]`, at least 0 but for rounding.

    References:
        Hinton, Vinyals and Dean, Distilling the knowledge in a neural network, 2015, section 2.
    """
    ours, theirs = F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1)
    return temperature**2 * F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)


def hidden_states_error(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """Mean squared error of hidden states over blocks, tokens that are no padding, and features.

    Args:
        student: After each block, `[b, t, h]`.
        teacher: Likewise.
        mask: `[b, t]`, 0 for padding; `None` if there is none.

    Returns:
        A scalar, float32.
    """
    errors = [(own.float() - other.float()).square().mean(-1) for own, other in zip(student, teacher, strict=True)]
    each = torch.stack(errors).mean(0)
    if mask is None:
        return each.mean()
    # Not a product: what stands at padding may be infinite.
    return each.masked_fill(mask == 0, 0.0).sum() / (mask != 0).sum().clamp(min=1)
