"""What a singular group is worth to the loss, from sums of the Fisher information. m: outputs, n: inputs."""

from __future__ import annotations

from torch import Tensor

from lowrank_pl.core import kronecker_groups
from lowrank_pl.core.precision import double
from lowrank_pl.importance import LayerFisher


def fisher_energies(
    weight: Tensor, fisher: LayerFisher, inputs: Tensor | None, outputs: Tensor | None, damping: float
) -> Tensor:
    """Energies `[min(m, n)]` in units of the loss, comparable across layers.

    With weights of both sides the Fisher information is taken as `a bᵀ / ΣF`, with those of one side as that side's
    share of `ΣF`; either way the weighted squared norm is scaled so that the weights add up to `ΣF`.

    Args:
        weight: `[m, n]`.
        fisher: Of the layer.
        inputs: `b [n]`, the sums by input, or `None` for equal weights.
        outputs: `a [m]`, the sums by output, or `None`.
        damping: See `axis_weighted_svd`.
    """
    total = float(double(fisher.output_sums).sum())
    b, a = (None if side is None else _normalised(side) for side in (inputs, outputs))
    return kronecker_groups(weight, b, a, damping).energies * total / weight.numel()


def _normalised(side: Tensor) -> Tensor:
    """Weights with mean 1; equal ones where there are none."""
    side = double(side)
    return side / side.mean() if bool(side.any()) else side + 1
