"""The kinds of importance that need no more than the Fisher information, or nothing at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

from torch import Tensor, nn

from lowrank_pl.core import LinearShape
from lowrank_pl.importance.batches import Batch
from lowrank_pl.importance.fisher import FisherKind, LayerFisher, empirical_fisher
from lowrank_pl.importance.importance import Importance, LayerImportance, Measured
from lowrank_pl.importance.passes import PerSampleLoss, Reduce


class Nothing(Importance[LayerImportance]):
    """For methods that look at the weights alone."""

    needs_data: ClassVar[bool] = False

    def measure(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        batches: Iterable[Batch],
        loss: PerSampleLoss,
        reduce_sum: Reduce | None = None,
        expected: int | None = None,
    ) -> Measured[LayerImportance]:
        """Nothing of anything."""
        del model, layers, batches, loss, reduce_sum, expected
        return Measured({}, 0)

    def layer(self, tensors: Mapping[str, Tensor]) -> LayerImportance:
        """Never asked for."""
        del tensors
        raise AssertionError("nothing was measured")

    def bytes(self, shape: LinearShape) -> int:
        """None."""
        del shape
        return 0


class _FisherInformation(Importance[LayerFisher]):
    """The empirical Fisher information, or its sums."""

    kind: ClassVar[FisherKind]

    def measure(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        batches: Iterable[Batch],
        loss: PerSampleLoss,
        reduce_sum: Reduce | None = None,
        expected: int | None = None,
    ) -> Measured[LayerFisher]:
        """See `empirical_fisher`."""
        return empirical_fisher(model, layers, batches, loss, self.kind, reduce_sum, expected)

    def layer(self, tensors: Mapping[str, Tensor]) -> LayerFisher:
        """From the sums and, where it was asked for, the whole."""
        return LayerFisher(tensors["input_sums"], tensors["output_sums"], tensors.get("full"))


class FisherSums(_FisherInformation):
    """Sums of the empirical Fisher information by input and by output of a layer."""

    kind = FisherKind.SUMS

    def bytes(self, shape: LinearShape) -> int:
        """Float32, one number per input and output."""
        return 4 * (shape.in_features + shape.out_features)


class FullFisher(_FisherInformation):
    """The empirical Fisher information of every single weight."""

    kind = FisherKind.FULL

    def bytes(self, shape: LinearShape) -> int:
        """Float32, one number per weight."""
        return 4 * shape.dense_params
