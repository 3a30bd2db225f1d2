"""How far an approximation is from the weight it replaces. m: out_features, n: in_features."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_pl.core.precision import double


def relative_error(
    weight: Tensor,
    approximation: Tensor,
    input_importance: Tensor | None = None,
    output_importance: Tensor | None = None,
) -> float:
    """`√(Σ a_i b_j (W − Ŵ)_ij² / Σ a_i b_j W_ij²)`, the relative Frobenius error when all importances are equal.

    Args:
        weight: `[m, n]`.
        approximation: `[m, n]`.
        input_importance: `b [n] >= 0` or `None`.
        output_importance: `a [m] >= 0` or `None`.

    Returns:
        0 for a perfect approximation (also of a weight that carries no importance), 1 for a zero one.
    """
    w = double(weight)
    delta = w - double(approximation)
    for importance, view in ((input_importance, (1, -1)), (output_importance, (-1, 1))):
        if importance is not None:
            root = double(importance).sqrt().view(view)
            w, delta = w * root, delta * root
    norm = torch.linalg.norm(w)
    return float(torch.linalg.norm(delta) / norm) if norm > 0 else 0.0
