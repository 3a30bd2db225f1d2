"""Bad tensors, ranks and ratios."""

from __future__ import annotations

import math

from lowrank_pl.errors.base import LowRankError


class ShapeError(LowRankError):
    """A tensor has another shape than its companions require."""

    def __init__(self, what: str, given: tuple[int, ...], expected: str) -> None:
        super().__init__(f"{what} has shape {tuple(given)}, expected {expected}.")


class RankError(LowRankError):
    """A rank is outside 1 … full rank."""

    def __init__(self, rank: int, full_rank: int, layer: str | None = None) -> None:
        where = f" for {layer!r}" if layer else ""
        super().__init__(
            f"rank {rank!r}{where} is impossible: allowed are whole numbers from 1 to the full rank "
            f"min(out, in) = {full_rank}. Choose a smaller rank, or leave the layer dense."
        )


class RangeError(LowRankError):
    """A number is outside its interval, or not a number at all."""

    def __init__(self, name: str, value: float | str, allowed: str) -> None:
        super().__init__(f"{name}={value!r} is out of range: allowed is {allowed}. Change {name}.")


class RatioError(LowRankError):
    """A share to keep is outside its interval, or not a number at all."""

    def __init__(self, name: str, value: float) -> None:
        super().__init__(
            f"{name}={value!r} is out of range: allowed is 0 < {name} <= 1. It is what is *kept* "
            "(0.33 keeps a third), not what is removed."
        )


class NonFiniteError(LowRankError):
    """NaN or Inf where a factorisation or an importance needs numbers.

    Args:
        what: Where they are.
        count: How many.
        layer: Of which layer.
        first: Where they come from, as far as that was looked for.
    """

    def __init__(self, what: str, count: int | None = None, layer: str | None = None, first: str = "") -> None:
        number = "NaN or Inf" if count is None else f"{count} NaN or Inf entries"
        where = f" of layer {layer!r}" if layer else ""
        origin = f" (first seen in {first})" if first else ""
        super().__init__(
            f"{what}{where} contains {number}{origin}; only finite numbers can be factorised or weighed. "
            "Start from a checkpoint whose training did not diverge, or exclude the layer through "
            "model.init_args.strategy.init_args.targets.exclude."
        )


class NonFiniteScoreError(NonFiniteError):
    """A model of which no score or prediction can be told, because what it puts out is NaN or Inf.

    Args:
        what: What is not finite, such as `"the loss of a test batch"`.
        first: Where in the forward pass NaN or Inf first come up, as far as that was found.
        wider: The option for numbers of a wider range.
    """

    def __init__(self, what: str, first: str = "", wider: str = "--trainer.precision 32-true") -> None:
        origin = f", first seen in {first}" if first else ""
        LowRankError.__init__(
            self,
            f"{what} is NaN or Inf{origin}. A score needs finite outputs, and so does everything "
            "that follows from it. Start from a checkpoint whose training did not diverge; if all weights are finite, "
            f"compute in a wider range of numbers, such as {wider}, and check the data for targets that are not.",
        )


class ImportanceError(LowRankError):
    """An importance is negative somewhere."""

    def __init__(self, what: str, value: float, position: tuple[int, ...]) -> None:
        super().__init__(
            f"{what} has the negative entry {value!r} at {position}; importances are squares or sums of "
            "squares and allowed from 0 upwards. Check what was passed as importance."
        )


class BudgetError(LowRankError):
    """A budget lies below what the lowest ranks that the targeted layers may have cost."""

    def __init__(
        self,
        asked: float,
        floor_cost: int,
        dense_cost: int,
        name: str = "keep_ratio",
        untargeted: int = 0,
        unit: str = "parameters",
        bound: str = "",
    ) -> None:
        beside = f"; {untargeted:,} more parameters of the model are not targeted at all" if untargeted else ""
        lowest = f"the lowest ranks in bounds{bound}," if bound else "one rank in each targeted layer"
        # Rounded up: the number is there to be copied.
        ratio = math.ceil(floor_cost / dense_cost * 1e6) / 1e6
        least = {"keep_ratio": f"{ratio:.6f}", "parameters": str(floor_cost)}.get(name, str(floor_cost + untargeted))
        remedies = [f"Ask for {name}={least} or more"] if ratio <= 1 else ["Set allow_dense, where the strategy has it"]
        remedies += ["lower the bounds"] if bound else []
        super().__init__(
            f"{name}={asked!r} cannot be reached: {lowest} already {'cost' if bound else 'costs'} {floor_cost:,} of "
            f"{dense_cost:,} {unit}, a keep_ratio of {ratio:.6f}{beside}. "
            f"{', '.join(remedies)}, or target fewer layers."
        )


class LatencyTableError(LowRankError):
    """A table of measured times cannot serve as the cost of ranks."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(
            f"the latency table {path!r} cannot be used: {problem}. Allowed is the latency.json that "
            "`lowrank-pl benchmark` writes for a model with the same layers; measure one, or use another cost."
        )


class FormCostError(LowRankError):
    """A cost that does not know the form in which layers are to be deployed."""

    def __init__(self, cost: str, known: str, form: str) -> None:
        super().__init__(
            f"cost: {cost} tells what layers in the form {known!r} cost, and the strategy's form is {form!r}. Allowed "
            f"are Parameters and Flops, or Latency with a table of `lowrank-pl benchmark --form {form}`; or set "
            f"form: {known}."
        )


class BudgetUnitError(LowRankError):
    """A budget in parameters together with a cost that is none."""

    def __init__(self, name: str, unit: str) -> None:
        super().__init__(
            f"{name} is a budget in parameters, and cost is measured in {unit}. Say the budget as keep_ratio, the "
            "share of what the dense layers cost, or leave cost at Parameters."
        )


class MemoryBoundError(LowRankError):
    """A bound on memory is below what one layer needs."""

    def __init__(self, bound: float, layer: str, needed: int) -> None:
        super().__init__(
            f"calibration.max_memory={bound!r} GiB is too little: measuring the layer {layer!r} alone takes "
            f"{needed / 2**30:.3g} GiB. Allowed is that or more, or null for no bound; or exclude the layer."
        )


class BatchShapeError(LowRankError):
    """A calibration batch does not tell its samples apart."""

    def __init__(self, kind: str, problem: str) -> None:
        super().__init__(
            f"a calibration batch ({kind}) {problem}; the first dimension of every tensor has to be the samples. "
            "Allowed are tensors, and mappings, tuples and lists of them; what belongs to the whole batch may have no "
            "dimension, or be no tensor. Bring batches into that form where they are collated."
        )


class LossShapeError(LowRankError):
    """A loss for calibration is not one number per sample."""

    def __init__(self, given: tuple[int, ...] | str, samples: int) -> None:
        what = given if isinstance(given, str) else f"shape {list(given)}"
        super().__init__(
            f"the loss of a calibration batch of {samples} samples has {what}, where it has to be a tensor of shape "
            f"[{samples}]: one loss per sample, each as if the sample were alone. A mean over the batch would weigh "
            "the weights otherwise. Take reduction='none', and sum or average what belongs to one sample."
        )


class NoGradientError(LowRankError):
    """A layer is only called where autograd records nothing, so that no gradient can be measured at its outputs."""

    def __init__(self, layer: str) -> None:
        super().__init__(
            f"the layer {layer!r} is only called without gradients, under torch.no_grad() or checkpoint(…, "
            "use_reentrant=True): how much the loss depends on it cannot be measured. Let the model record gradients "
            "while it is measured (use_reentrant=False), or leave the layer out through "
            "model.init_args.strategy.init_args.targets.exclude."
        )
