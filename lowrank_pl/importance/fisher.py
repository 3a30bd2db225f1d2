"""The empirical Fisher information of linear layers, per sample and exact. m: out_features, n: in_features."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

from lowrank_pl.errors.numerics import NonFiniteError
from lowrank_pl.importance.squares import Accumulator, AxisSquares, FullSquares, Scratch
from lowrank_pl.importance.tape import LinearTape, SampleMixingError

logger = logging.getLogger(__name__)

Batch = Mapping[str, Tensor]
PerSampleLoss = Callable[[Batch], Tensor]
Reduce = Callable[[Tensor], Tensor]


class FisherKind(Enum):
    """How much of the Fisher information a method needs: `[m, n]`, or only its sums along both axes."""

    FULL = "full"
    SUMS = "sums"


@dataclass(frozen=True)
class LayerFisher:
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


@dataclass(frozen=True)
class Fisher:
    """The Fisher information of several layers.

    Attributes:
        layers: By fully qualified name.
        num_samples: `|D|`, over all processes.
    """

    layers: dict[str, LayerFisher]
    num_samples: int


def empirical_fisher(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    batches: Iterable[Batch],
    per_sample_loss: PerSampleLoss,
    kind: FisherKind = FisherKind.FULL,
    reduce_sum: Reduce | None = None,
) -> Fisher:
    """Accumulates squared per-sample gradients over batches: one forward and one backward pass each.

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

    Returns:
        Float32 tensors on the model's device, divided by the number of samples of all processes.

    Raises:
        NonFiniteError: a loss is NaN or Inf, or a layer's accumulated gradients are (it is named).

    References:
        Hsu et al., ICLR 2022, equation 4 (observed labels, over the training data).
    """
    samples = 0
    singly = False
    with _frozen_eval(model):
        accumulators: dict[str, Accumulator] = {}
        scratch = Scratch()
        for name, layer in layers.items():
            make = FullSquares if kind is FisherKind.FULL else AxisSquares
            accumulators[name] = make(layer.out_features, layer.in_features, layer.weight.device, scratch)
        run = _Run(layers, per_sample_loss, accumulators)
        with run:
            for batch in batches:
                if not singly:
                    try:
                        samples += run.add(batch)
                        continue
                    except SampleMixingError:
                        logger.info("a layer sees tensors shared by all samples of a batch: measuring one by one")
                        singly = True
                samples += sum(run.add(sample) for sample in _single_samples(batch))
        return _collect(accumulators, samples, kind, reduce_sum)


class _Run:
    """One tape over many batches."""

    def __init__(
        self, layers: Mapping[str, nn.Linear], loss: PerSampleLoss, accumulators: Mapping[str, Accumulator]
    ) -> None:
        self._loss = loss
        self._rehearsed = False
        self._tape = LinearTape(layers, lambda name, x, g: accumulators[name].add(x, g))

    def __enter__(self) -> _Run:
        self._tape.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._tape.__exit__(None, None, None)

    def add(self, batch: Batch) -> int:
        """Adds one batch; returns its number of samples. Nothing is accumulated if it raises in the forward."""
        size = int(next(iter(batch.values())).shape[0])
        with torch.enable_grad():
            if size and not self._rehearsed:
                self._rehearsed = True
                self._tape.rehearse(lambda: self._loss(next(_single_samples(batch))))
            self._tape.start(size)
            losses = self._loss(batch)
            if not bool(torch.isfinite(losses.detach()).all()):
                raise NonFiniteError("the loss of a calibration batch", int((~torch.isfinite(losses)).sum()))
            losses.sum().backward()
        self._tape.finish()
        return size


def _single_samples(batch: Batch) -> Iterator[Batch]:
    size = int(next(iter(batch.values())).shape[0])
    for index in range(size):
        yield {key: value[index : index + 1] for key, value in batch.items()}


@contextmanager
def _frozen_eval(model: nn.Module) -> Iterator[None]:
    """Eval mode and frozen parameters inside the block; every module's mode and every flag restored after."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        # A trainer may call this from under no_grad or inference mode; hooks need a graph.
        with torch.inference_mode(False):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _collect(
    accumulators: Mapping[str, Accumulator], samples: int, kind: FisherKind, reduce_sum: Reduce | None
) -> Fisher:
    tensors = [tensor for accumulator in accumulators.values() for tensor in accumulator.tensors()]
    if reduce_sum is not None and tensors:
        count = torch.tensor([float(samples)], device=tensors[0].device)
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
