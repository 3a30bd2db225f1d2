"""The empirical Fisher information of linear layers, per sample and exact. m: out_features, n: in_features."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

from lowrank_pl.core.checks import check_importance
from lowrank_pl.errors.numerics import NonFiniteError
from lowrank_pl.importance.batches import Batch as Batch
from lowrank_pl.importance.frozen import frozen_eval
from lowrank_pl.importance.importance import LayerImportance, Measured
from lowrank_pl.importance.passes import Passes
from lowrank_pl.importance.passes import PerSampleLoss as PerSampleLoss
from lowrank_pl.importance.passes import Reduce as Reduce
from lowrank_pl.importance.squares import Accumulator, AxisSquares, FullSquares, Scratch
from lowrank_pl.nn import dense_shape, dense_weight


class FisherKind(Enum):
    """How much of the Fisher information a method needs: `[m, n]`, or only its sums along both axes."""

    FULL = "full"
    SUMS = "sums"


@dataclass(frozen=True)
class LayerFisher(LayerImportance):
    """`F_ij = (1/|D|) Σ_d (∂L_d/∂W_ij)²` of one layer.

    Attributes:
        input_sums: `Σ_i F_ij`, `[n]`: one per input.
        output_sums: `Σ_j F_ij`, `[m]`: one per output.
        full: `F [m, n]`, or `None` where only the sums were asked for.
    """

    input_sums: Tensor
    output_sums: Tensor
    full: Tensor | None = None

    def to(self, device: str) -> LayerFisher:
        """The same on another device."""
        full = None if self.full is None else self.full.to(device)
        return LayerFisher(self.input_sums.to(device), self.output_sums.to(device), full)

    def tensors(self) -> dict[str, Tensor]:
        """By their names."""
        whole = {} if self.full is None else {"full": self.full}
        return {"input_sums": self.input_sums, "output_sums": self.output_sums, **whole}

    @property
    def is_zero(self) -> bool:
        """Whether no loss depended on the layer."""
        return not bool(self.input_sums.any())

    def check(self, name: str) -> None:
        """Raises an error for an importance that is negative or not finite, with the layer's name and the entry."""
        told = {"input_sums": " (sums by input)", "output_sums": " (sums by output)", "full": ""}
        for part, tensor in self.tensors().items():
            check_importance(f"the Fisher information{told[part]} of layer {name!r}", tensor, tuple(tensor.shape))


Fisher = Measured[LayerFisher]
"""The Fisher information of several layers."""


def empirical_fisher(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    per_sample_loss: PerSampleLoss,
    kind: FisherKind = FisherKind.FULL,
    reduce_sum: Reduce | None = None,
    expected: int | None = None,
) -> Fisher:
    """Accumulates squared per-sample gradients over batches: one forward and one backward pass each.

    A model in which samples of a batch share tensors (DeBERTa projects relative positions once for all) is measured in
    vectorised passes, in each of which every sample goes through the model alone; one that cannot be vectorised,
    sample by sample, and a warning estimates the time. A batch that memory is too short for is
    halved, and so are those after it, with a warning.

    Gradients are in the dtype of the model's weights, without autocast: products in bfloat16 would save time and memory
    at the cost of digits. Squares and sums are float32.

    The model runs in eval mode (no dropout) and leaves in the mode it came in. No parameter needs or gets a
    gradient. Padding contributes nothing as long as no loss depends on it. The global random state is only
    moved if the model itself draws from it in eval mode.

    Args:
        model: The module that `per_sample_loss` runs.
        layers: The layers to measure, by name; parts of `model`.
        batches: Model inputs, on the model's device, first dimension samples. Each may be used once.
        per_sample_loss: Maps a batch to the losses of its samples `[b]`, each as if it were alone.
        kind: What to accumulate. Sums are cheaper in time and memory.
        reduce_sum: Sums a tensor over processes and returns it; called once, on one flat tensor.
        expected: How many samples the batches hold, for the estimate of the time.

    Returns:
        Float32 tensors on the model's device, divided by the number of samples of all processes.

    Raises:
        NonFiniteError: a loss is NaN or Inf, or a layer's accumulated gradients are (it is named).
        torch.OutOfMemoryError, RuntimeError: memory is too short for a single sample.

    References:
        Hsu et al., ICLR 2022, equation 4 (observed labels, over the training data).
    """
    with frozen_eval(model):
        accumulators: dict[str, Accumulator] = {}
        scratch = Scratch()
        for name, layer in layers.items():
            make = FullSquares if kind is FisherKind.FULL else AxisSquares
            shape, device = dense_shape(layer), dense_weight(layer).device
            accumulators[name] = make(shape.out_features, shape.in_features, device, scratch)
        with Passes(layers, per_sample_loss, accumulators, expected) as passes:
            samples = sum(passes.add(batch) for batch in batches)
        return _collect(accumulators, samples, kind, reduce_sum)


def _collect(
    accumulators: Mapping[str, Accumulator], samples: int, kind: FisherKind, reduce_sum: Reduce | None
) -> Fisher:
    tensors = [tensor for accumulator in accumulators.values() for tensor in accumulator.tensors()]
    if reduce_sum is not None and tensors:
        count = torch.tensor([float(samples)], dtype=torch.float32, device=tensors[0].device)
        flat = reduce_sum(torch.cat([tensor.flatten() for tensor in tensors] + [count]))
        samples = round(float(flat[-1]))
        for tensor, part in zip(tensors, flat[:-1].split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))
    layers = {}
    for name, accumulator in accumulators.items():
        parts = [tensor / max(samples, 1) for tensor in accumulator.tensors()]
        if not all(bool(torch.isfinite(part).all()) for part in parts):
            raise NonFiniteError("the accumulated gradient", layer=name)
        # Sums by Gram matrices can round to slightly below zero where the exact value is zero.
        parts = [part.clamp_(min=0) for part in parts]
        if kind is FisherKind.FULL:
            layers[name] = LayerFisher(parts[0].sum(0), parts[0].sum(1), parts[0])
        else:
            layers[name] = LayerFisher(parts[0], parts[1])
    return Fisher(layers, samples)
