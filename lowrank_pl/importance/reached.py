"""Which tokens a gradient comes back to. b: samples, t: tokens, m: out_features."""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDING = 1e-5
"""Of the largest gradient of a sample. Where none comes back, rounding leaves about 1e-6 of it at most (1.2e-6 in
SmolLM2-135M, float32); what a token below the bound would add to a second moment of gradients is 1e-10 of another's."""


def reached(g: Tensor) -> Tensor:
    """Tells tokens that the loss depends on from those that it does not.

    No gradient comes back to padding, to what the head never looks at, and to the query of a decoder's first token,
    which sees nothing but itself. Where the sum is zero rounding may leave something, on one processor and in one batch
    and not in another: gradients are compared with the largest of their own sample.

    Args:
        g: Gradients at the outputs of a layer, `[b, …, m]`; with two dimensions every row is a sample.

    Returns:
        `[b, …]`, boolean. What is NaN or Inf counts as reached, so that it does not vanish without a word.
    """
    size = g.abs().amax(-1)
    largest = size.flatten(1).amax(1).reshape(-1, *[1] * (size.ndim - 1)) if size.ndim > 1 else size
    return (size > _ROUNDING * largest) | ~torch.isfinite(size)
