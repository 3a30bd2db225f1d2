"""Labels drawn from the distribution of which a loss is the negative logarithm. c: classes."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def drawn_classes(logits: Tensor, uniform: Tensor) -> Tensor:
    """Class ids `[…]`, each drawn from the softmax of logits `[…, c]`: what cross-entropy implies.

    Args:
        logits: `[…, c]`.
        uniform: `[…]`, between 0 and 1; the label is where it lies among the summed probabilities.
    """
    bounds = logits.cpu().double().softmax(-1).cumsum(-1)[..., :-1].contiguous()
    classes: Tensor = torch.searchsorted(bounds, uniform[..., None].contiguous(), right=True).squeeze(-1)
    return classes.to(logits.device)


def drawn_values(values: Tensor, uniform: Tensor) -> Tensor:
    """Values `[b]`, drawn from a normal distribution around those predicted, with variance ½.

    `(y − ŷ)²` is, up to a constant, the negative logarithm of that density; with another variance the gradients would
    be scaled as a whole.

    Args:
        values: `[b]`, predicted.
        uniform: `[b]`, between 0 and 1.
    """
    # The quantile of 0 is not finite.
    normal: Tensor = torch.special.ndtri(uniform.clamp(min=1e-12))
    return values + math.sqrt(0.5) * normal.to(values)
