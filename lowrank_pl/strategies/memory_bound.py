"""What a run that factorises block by block takes at most, told from shapes alone. m: outputs, n: inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from lowrank_pl.core import LinearShape, decomposing_bytes
from lowrank_pl.importance import SecondMoments


@dataclass(frozen=True)
class MemoryBound:
    """Bytes by part, on the device unless it says otherwise.

    Attributes:
        weights: The whole model; blocks that are behind hold factors, and their dense layers are gone.
        factors: Those of the block at hand, beside its dense layers; of all blocks where dense layers have to stay.
        measuring: Sums of the largest group of layers, before ranks are given; `calibration.max_memory` bounds them.
        decomposing: The decomposition that tells the energies of the largest layer, while its group's sums are there.
        fitting: Sums, moments and the decomposition of the largest layer.
        kept_calls: What the block at hand is called with, in every model that counts, on all samples.
        staying: Factors of the other blocks: on a CPU dense layers that are done stay beside them.
        disk: Moments of output gradients and the factors of finished blocks, until the run has ended.
    """

    weights: int
    factors: int
    measuring: int
    decomposing: int
    fitting: int
    kept_calls: int
    staying: int
    disk: int

    @property
    def peak(self) -> int:
        """The most at one time: layers are measured before the first is fitted."""
        return self.weights + max(self.measuring + self.decomposing, self.factors + self.fitting + self.kept_calls)

    def lines(self, samples: str) -> list[str]:
        """The same as text.

        Args:
            samples: Which samples the kept calls are of, in words.
        """
        parts = {
            "weights": self.weights,
            "measuring the largest group of layers": self.measuring,
            "decomposing the largest layer": self.decomposing,
            "factors": self.factors,
            "fitting the largest layer": self.fitting,
            f"kept calls of one block ({samples})": self.kept_calls,
        }
        told = [f"  {name}: {gigabytes(size)}" for name, size in parts.items()]
        return [
            f"memory block by block: at most {gigabytes(self.peak)}, beside the activations of one batch",
            *told,
            f"  on a CPU, where finished dense layers stay: {gigabytes(self.staying)} more",
            f"  on disk until the end: {gigabytes(self.disk)}",
        ]


def gigabytes(size: int) -> str:
    """Bytes as text, in GiB."""
    return f"{size / 2**30:.2f} GiB"


def fitting_bytes(shape: LinearShape) -> int:
    """What fitting one layer takes, in float64: both sums and what is solved with them, or the metric's roots; `M`.

    Seven matrices `[n, n]`, four `[m, n]` and two `[m, m]` at a time.
    """
    m, n = shape.out_features, shape.in_features
    return 8 * (7 * n * n + 4 * m * n + 2 * m * m)


def memory_bound(
    shapes: Mapping[str, LinearShape],
    kept: Mapping[str, int],
    parameters: int,
    item: int,
    beforehand: SecondMoments | None,
    groups: Sequence[Sequence[str]],
    call: int,
    stays: bool = False,
) -> MemoryBound:
    """Adds up the parts.

    Args:
        shapes: The targeted layers, in the model's order.
        kept: How many parameters the factors of each factorised one have.
        parameters: Of the whole model.
        item: Bytes of one.
        beforehand: What is measured before ranks are given, `None` for nothing.
        groups: The layers that are measured together.
        call: Numbers that a block is called with, on all samples, in all models that count.
        stays: Whether dense layers stay until the end, for a refit.
    """
    factorised = {name: shape for name, shape in shapes.items() if name in kept}
    blocks = [sum(kept[name] for name in names) for _, names in groupby(factorised, _block)]
    measuring = (
        0
        if beforehand is None
        else max((sum(beforehand.bytes(shapes[name]) for name in names) for names in groups), default=0)
    )
    outputs = beforehand is not None and beforehand.outputs != "none"
    moments = sum(_moment(shape, beforehand) for shape in shapes.values()) if outputs else 0
    factors = sum(blocks) if stays else max(blocks, default=0)
    return MemoryBound(
        parameters * item,
        factors * item,
        measuring,
        0 if beforehand is None else max(map(decomposing_bytes, shapes.values()), default=0),
        max((fitting_bytes(shape) for shape in factorised.values()), default=0),
        call * item,
        (sum(blocks) - factors) * item,
        moments + sum(kept.values()) * item,
    )


def _block(name: str) -> str:
    """The part of a name as far as its first number, which is that of the block."""
    parts = name.split(".")
    at = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[: at + 1])


def _moment(shape: LinearShape, importance: SecondMoments | None) -> int:
    """The moment of outputs, kept in float32."""
    assert importance is not None
    m, extent = shape.out_features, importance.outputs
    return 4 * m * (extent if isinstance(extent, int) else {"full": m, "diagonal": 1, "none": 0}[extent])
