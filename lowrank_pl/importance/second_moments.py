"""Second moments of what goes into layers and of the gradients at what comes out.

b: samples, t: tokens, m: out_features, n: in_features.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lowrank_pl.core import EmbeddingShape, LinearShape, nearest_kronecker
from lowrank_pl.core.checks import check_finite
from lowrank_pl.errors.numerics import NonFiniteError, RangeError
from lowrank_pl.importance.batches import Batch
from lowrank_pl.importance.frozen import frozen_eval
from lowrank_pl.importance.gram import GramSum
from lowrank_pl.importance.importance import Importance, LayerImportance, Measured
from lowrank_pl.importance.passes import Passes, PerSampleLoss, Reduce
from lowrank_pl.importance.reached import reached
from lowrank_pl.importance.token_counts import TokenCounts, frequencies
from lowrank_pl.nn import dense_shape, is_dense_linear, is_embedding

logger = logging.getLogger(__name__)

Extent = Literal["full", "diagonal", "none"] | int
"""How much of a moment is kept: all, the diagonal, nothing, or blocks of so many features along the diagonal."""


@dataclass(frozen=True)
class LayerMoments(LayerImportance):
    """Second moments of one layer.

    Attributes:
        inputs: `C = (1/T) Σ x xᵀ` over the `T` tokens that a loss depends on, `[n, n]`, its diagonal `[n]`, blocks
            along it `[n / s, s, s]`, or `None` where it was not asked for. Layers with one input share one tensor. Of a
            look-up, whose inputs are one-hot, always the diagonal `[n]`: `frequencies` of the tokens.
        outputs: `G = (1/|D|) Σ g gᵀ` over the same tokens, of the gradients of the summed per-sample losses, `[m, m]`,
            its diagonal `[m]`, blocks `[m / s, s, s]`, or `None`.
    """

    inputs: Tensor | None
    outputs: Tensor | None

    def tensors(self) -> dict[str, Tensor]:
        """`inputs` and `outputs`, where they are."""
        both = {"inputs": self.inputs, "outputs": self.outputs}
        return {name: tensor for name, tensor in both.items() if tensor is not None}

    @property
    def is_zero(self) -> bool:
        """Whether no loss depended on the layer."""
        return not all(bool(tensor.any()) for tensor in self.tensors().values())

    def check(self, name: str) -> None:
        """Raises `NonFiniteError` for NaN and Inf."""
        for what, tensor in self.tensors().items():
            check_finite(f"the second moment of the {what}", tensor, name)


class SecondMoments(Importance[LayerMoments]):
    """The two factors of K-FAC's approximation of the Fisher information, `C ⊗ G`, of every layer.

    One forward and one backward pass per batch. A token of which no gradient comes back, be it padding or one that the
    head never looks at, counts for neither moment. Sums are float64, the means float32. Of a look-up the tokens are
    counted, as if each had been seen once more. If a head puts out tokens with the same matrix, its moments are
    measured, too, and the look-up gets the Kronecker product that is nearest to the sum of both uses; not so where one
    side alone is asked for.

    Args:
        inputs: `full`, only the `diagonal`, blocks of so many features along the diagonal (64 are the heads of many
            encoders; the number divides that of every layer's features), or `none`.
        outputs: The same for the gradients at the outputs.

    References:
        Martens and Grosse, Optimizing neural networks with Kronecker-factored approximate curvature, ICML 2015, section
        3. That tokens without gradient are left out of `C` is this project's.
    """

    def __init__(self, inputs: Extent = "full", outputs: Extent = "full") -> None:
        for side, extent in (("inputs", inputs), ("outputs", outputs)):
            if extent not in ("full", "diagonal", "none") and not (isinstance(extent, int) and extent >= 1):
                raise RangeError(f"importance.{side}", extent, "'full', 'diagonal', 'none' or a block size from 1")
        self.inputs = inputs
        self.outputs = outputs

    def measure(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        batches: Iterable[Batch],
        loss: PerSampleLoss,
        reduce_sum: Reduce | None = None,
        expected: int | None = None,
    ) -> Measured[LayerMoments]:
        """See `Importance.measure`."""
        device = next(model.parameters()).device
        for extent, sides in ((self.inputs, "in"), (self.outputs, "out")):
            if isinstance(extent, int):
                check_blocks("block_size", extent, _shapes_of(layers), (sides,))
        heads = {} if self.inputs == "none" or self.inputs != self.outputs else _heads_of(model, layers)
        both = {**layers, **{head: model.get_submodule(head) for head in heads}}
        sums = self._sums(model, both, heads, batches, loss, expected, share=True)
        if not _agree(list(both), sums, device, reduce_sum):
            logger.info("layers that shared their input in the first batch do not always: measuring each apart")
            sums = self._sums(model, both, heads, batches, loss, expected, share=False)
        assert sums is not None
        measured = _collect(_shapes_of(both), sums, device, reduce_sum)
        return Measured(_with_heads(measured.layers, heads), measured.num_samples)

    def _sums(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        heads: Mapping[str, str],
        batches: Iterable[Batch],
        loss: PerSampleLoss,
        expected: int | None,
        share: bool,
    ) -> _Sums | None:
        """The sums of this process; `None` if inputs were shared that should not be."""
        vocabularies = {n: s.in_features for n, s in _shapes_of(layers).items() if isinstance(s, EmbeddingShape)}
        inputs = _InputSums(self.inputs, share, vocabularies)
        own = {name: _MomentSum(name, inputs, "diagonal" if name in heads else self.outputs) for name in layers}
        try:
            with frozen_eval(model), Passes(layers, loss, own, expected) as passes:
                samples = sum(passes.add(batch) for batch in batches)
        except _InputsDifferError:
            return None
        return _Sums(inputs, own, samples)

    def layer(self, tensors: Mapping[str, Tensor]) -> LayerMoments:
        """From `inputs` and `outputs`."""
        return LayerMoments(tensors.get("inputs"), tensors.get("outputs"))

    def bytes(self, shape: LinearShape) -> int:
        """Float64 sums of both sides, were no input shared."""
        diagonal = isinstance(shape, EmbeddingShape) and self.inputs != "none"
        sides = (("diagonal" if diagonal else self.inputs, shape.in_features), (self.outputs, shape.out_features))
        # A head may be tied to a look-up, of which as much is kept.
        return (2 if diagonal else 1) * sum(8 * size * _width(extent, size) for extent, size in sides)


def _shapes_of(layers: Mapping[str, nn.Module]) -> dict[str, LinearShape]:
    """The shapes of dense layers."""
    return {name: dense_shape(layer) for name, layer in layers.items()}


def _heads_of(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """The linear layers of a model that use the matrix of a look-up, and the name of the look-up."""
    owners = {id(layer.weight): name for name, layer in layers.items() if is_embedding(layer)}
    return {
        name: owners[id(module.weight)]
        for name, module in model.named_modules()
        if is_dense_linear(module) and id(module.weight) in owners
    }


def _with_heads(measured: Mapping[str, LayerMoments], heads: Mapping[str, str]) -> dict[str, LayerMoments]:
    """Puts what was measured of heads into the moments of the look-ups.

    For a change `D [v, d]` of the matrix a look-up adds `Σ_i c_i D_i G D_iᵀ` to the loss, and a head, of whose inputs
    `H` and whose logits' gradients `q` are the moments, `Σ_i q_i D_i H D_iᵀ`: the same form with the sides exchanged.
    """
    found = {name: layer for name, layer in measured.items() if name not in heads}
    for head, name in heads.items():
        own, other = found[name], measured[head]
        assert own.inputs is not None
        assert own.outputs is not None
        assert other.inputs is not None
        assert other.outputs is not None
        c, g = nearest_kronecker((own.inputs, own.outputs), (other.outputs, other.inputs))
        found[name] = LayerMoments(c.float().clamp(min=0), g.float())
    return found


def check_blocks(
    argument: str, block_size: int, shapes: Mapping[str, LinearShape], sides: Iterable[str] = ("in", "out")
) -> None:
    """Raises `RangeError` for blocks that do not divide the features of a layer's sides, `in` and `out`.

    The moment of a look-up's inputs is always a diagonal.
    """
    for name, shape in shapes.items():
        for side in (side for side in sides if side == "out" or not isinstance(shape, EmbeddingShape)):
            size = shape.in_features if side == "in" else shape.out_features
            if size % block_size:
                raise RangeError(argument, block_size, f"a divisor of {size}, the features of {name!r}")


def _width(extent: Extent, size: int) -> int:
    """How many numbers are kept for each feature."""
    return extent if isinstance(extent, int) else {"full": size, "diagonal": 1, "none": 0}[extent]


def _gram(size: int, device: torch.device, extent: Extent) -> GramSum:
    return GramSum(size, device, extent == "diagonal", block_size=extent if isinstance(extent, int) else None)


class _InputsDifferError(Exception):
    """Layers that had one input in the first pass have several in another."""


class _InputSums:
    """The sums of the layers' inputs; layers that see the same input have one between them.

    Which layers those are is seen in the first pass, by content, and looked at again in every further one.
    """

    def __init__(self, extent: Extent, share: bool, vocabularies: Mapping[str, int]) -> None:
        self.extent = extent
        self._vocabularies = vocabularies
        self._share = share
        self._leaders: dict[str, str] = {}
        self._seen: dict[str, tuple[object, ...]] = {}
        self.sums: dict[str, GramSum | TokenCounts] = {}
        self.tokens: dict[str, int] = {}

    def add(self, name: str, x: Tensor, kept: Tensor) -> None:
        """Adds the rows `x[kept]` of a layer's input, `x [b, t, n]`, `kept [b, t]`; a name that comes again: next pass.

        Raises:
            _InputsDifferError: the layer shares its sum with one that has seen something else in this pass.
        """
        if self.extent == "none":
            return
        if name in self._seen:
            self._seen = {}
        rows = x[kept]
        mark = _mark(rows) if self._share else (name,)
        leader = self._leaders.get(name)
        if leader is None:
            leader = next((other for other, seen in self._seen.items() if seen == mark), name)
            leader = self._leaders[name] = self._leaders.get(leader, name)
        earlier = next((other for other in self._seen if self._leaders[other] == leader), None)
        self._seen[name] = mark
        if earlier is not None:
            if self._seen[earlier] != mark:
                raise _InputsDifferError(f"{name!r} and {earlier!r} shared their input in the first pass only")
            return
        if leader not in self.sums:
            size = self._vocabularies.get(name)
            gram = _gram(x.shape[-1], x.device, self.extent) if size is None else TokenCounts(size, x.device)
            self.sums[leader] = gram
        self.sums[leader].add(rows)
        self.tokens[leader] = self.tokens.get(leader, 0) + len(rows)

    def leader(self, name: str) -> str:
        """Under whose name a layer's sum is kept."""
        return self._leaders.get(name, name)


def _mark(rows: Tensor) -> tuple[object, ...]:
    """Tells different inputs apart by their content: a sum over everything, and over one row and one column."""
    parts = (rows, rows[:1], rows[:, :1])
    return (tuple(rows.shape), *(float(part.sum(dtype=torch.float32)) for part in parts))


class _MomentSum:
    """Adds up what one layer's tape hands out."""

    def __init__(self, name: str, inputs: _InputSums, outputs: Extent) -> None:
        self.name = name
        self._inputs = inputs
        self.extent = outputs
        self.outputs: GramSum | None = None

    def add(self, x: Tensor, g: Tensor) -> None:
        """Adds the tokens of `x [b, t, n]` and `g [b, t, m]` that have a gradient."""
        kept = reached(g)
        self._inputs.add(self.name, x, kept)
        if self.extent != "none":
            if self.outputs is None:
                self.outputs = _gram(g.shape[-1], g.device, self.extent)
            self.outputs.add(g[kept])


@dataclass(frozen=True)
class _Sums:
    """What one process has added up over its samples."""

    inputs: _InputSums
    layers: dict[str, _MomentSum]
    samples: int


def _agree(names: list[str], sums: _Sums | None, device: torch.device, reduce_sum: Reduce | None) -> bool:
    """Whether all processes have sums, and the same layers share theirs. All of them must call it."""
    if reduce_sum is None:
        return sums is not None
    leaders = [-1] * len(names) if sums is None else [names.index(sums.inputs.leader(name)) for name in names]
    own = torch.tensor([1, int(sums is not None), *leaders], dtype=torch.float32, device=device)
    total = reduce_sum(torch.stack([own, own.square()]))
    world = total[0, 0]
    # Equal numbers are those whose variance over processes is zero.
    same = bool((world * total[1] == total[0].square()).all())
    return same and bool(total[0, 1] == world)


def _collect(
    shapes: Mapping[str, LinearShape], sums: _Sums, device: torch.device, reduce_sum: Reduce | None
) -> Measured[LayerMoments]:
    """Means over all processes; zeros for a layer that no loss depended on. Uses the sums up, one at a time."""
    inputs, samples = sums.inputs, sums.samples

    def over_processes(tensor: Tensor) -> Tensor:
        return tensor if reduce_sum is None else reduce_sum(tensor)

    def mean_of(gram: GramSum | TokenCounts | None, extent: Extent, size: int, count: float) -> Tensor | None:
        if extent == "none":
            return None
        gram = gram or _gram(size, device, extent)
        total, count = over_processes(gram.matrix()), float(over_processes(gram.total.new_tensor([count])))
        mean = frequencies(total, count) if isinstance(gram, TokenCounts) else total.div_(max(count, 1.0))
        # A mean over samples has no more digits than this, and half the memory is enough to keep it.
        return mean.float()

    own_samples = torch.tensor([float(samples)], dtype=torch.float32, device=device)
    everywhere = round(float(over_processes(own_samples)))
    means: dict[str, Tensor | None] = {}
    layers = {}
    for name, shape in shapes.items():
        leader = inputs.leader(name)
        if leader not in means:
            tokens = inputs.tokens.get(leader, 0)
            total = inputs.sums.pop(leader, None)
            if total is None and isinstance(shape, EmbeddingShape):
                total = TokenCounts(shape.in_features, device)
            means[leader] = mean_of(total, inputs.extent, shape.in_features, tokens)
        own = sums.layers.pop(name)
        outputs = mean_of(own.outputs, own.extent, shape.out_features, samples)
        layers[name] = LayerMoments(means[leader], outputs)
        for what, tensor in layers[name].tensors().items():
            if not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError(f"the second moment of the {what}", layer=name)
    return Measured(layers, everywhere)
