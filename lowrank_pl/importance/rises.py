"""What factors would cost the loss by the whole Fisher information of a layer. b: samples, t: tokens, r: rank.

`W`: `[m, n]`; `x`: `[b, t, n]`, inputs; `g`: `[b, t, m]`, gradients at the outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank_pl.core import Factors, LinearShape
from lowrank_pl.core.checks import check_finite
from lowrank_pl.core.precision import float64_device
from lowrank_pl.importance.batches import Batch
from lowrank_pl.importance.frozen import frozen_eval
from lowrank_pl.importance.importance import Importance, LayerImportance, Measured
from lowrank_pl.importance.passes import Passes, PerSampleLoss, Reduce
from lowrank_pl.nn import dense_weight


@dataclass(frozen=True)
class LayerRises(LayerImportance):
    """`½ (1/|D|) Σ_d ⟨∂L_d/∂W, W − Ŵ⟩²` of one layer, for several `Ŵ`.

    Attributes:
        values: `[k]`, float64, in units of the loss, in the order in which the candidates were given.
    """

    values: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """`values`."""
        return {"values": self.values}

    @property
    def is_zero(self) -> bool:
        """Whether no loss depended on the layer."""
        return not bool(self.values.any())

    def check(self, name: str) -> None:
        """Raises `NonFiniteError` for NaN and Inf."""
        check_finite("the rise of the loss", self.values, name)


class SecondOrderRise(Importance[LayerRises]):
    """By how much the loss would rise, to second order, with candidates in the place of a layer's weight.

    The quadratic form of the layer's whole Fisher information, not only of its diagonal or of a Kronecker product, so
    methods that approximate it in different ways can be compared. It is `(Σ_t gᵀ (W − A B) x)²` per sample: no gradient
    of the weight is formed.

    Args:
        candidates: By layer and by any name, factors of the layer's shape; every layer has the same names.
    """

    def __init__(self, candidates: Mapping[str, Mapping[str, Factors]]) -> None:
        self._candidates = candidates

    def measure(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        batches: Iterable[Batch],
        loss: PerSampleLoss,
        reduce_sum: Reduce | None = None,
        expected: int | None = None,
    ) -> Measured[LayerRises]:
        """See `Importance.measure`."""
        sums = {name: _RiseSum(dense_weight(layer), self._candidates[name]) for name, layer in layers.items()}
        with frozen_eval(model), Passes(layers, loss, sums, expected) as passes:
            samples = sum(passes.add(batch) for batch in batches)
        totals = torch.stack([rise.total for rise in sums.values()])
        count = totals.new_tensor([float(samples)])
        if reduce_sum is not None:
            flat = reduce_sum(torch.cat([totals.flatten(), count]))
            totals, count = flat[:-1].view_as(totals), flat[-1:]
        means = totals / count.clamp(min=1) / 2
        return Measured({name: LayerRises(mean) for name, mean in zip(sums, means, strict=True)}, round(float(count)))

    def layer(self, tensors: Mapping[str, Tensor]) -> LayerRises:
        """From `values`."""
        return LayerRises(tensors["values"])

    def bytes(self, shape: LinearShape) -> int:
        """Next to nothing besides the candidates themselves."""
        del shape
        return 0


class _RiseSum:
    """Adds up what one layer's tape hands out."""

    def __init__(self, weight: Tensor, candidates: Mapping[str, Factors]) -> None:
        # Gradients of float16 come as float32, in which they do not vanish.
        self._weight = weight.detach().float() if weight.dtype is torch.float16 else weight.detach()
        self._pairs = [factors.like(self._weight).balanced() for factors in candidates.values()]
        dtype = torch.float64 if float64_device(weight.device) == weight.device else torch.float32
        self.total = torch.zeros(len(self._pairs), dtype=dtype, device=weight.device)

    def add(self, x: Tensor, g: Tensor) -> None:
        """Adds the samples of `x [b, t, n]` and `g [b, t, m]`."""
        x, g = x.to(self._weight), g.to(self._weight)
        dense = ((g @ self._weight) * x).sum((1, 2), dtype=self.total.dtype)
        for place, (a, b) in enumerate(self._pairs):
            factorised = ((g @ a) * (x @ b.mT)).sum((1, 2), dtype=self.total.dtype)
            self.total[place] += (dense - factorised).square().sum()
