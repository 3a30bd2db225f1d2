"""What was done to a model's layers, for reports; it travels in checkpoints beside the layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lowrank_pl.core.shapes import LinearShape
from lowrank_pl.nn import LayerForm, two_factors

DENSE = "dense"


@dataclass(frozen=True)
class LayerRecord:
    """One targeted layer.

    Attributes:
        name: Fully qualified name.
        out_features: m.
        in_features: n.
        rank: Rank of the factors; full rank where the layer stayed dense.
        kind: The `name` of its form, such as `"low_rank"`, or `"dense"`.
        parameters: Parameters of weight or factors, without bias.
        error: `‖W − AB‖_F / ‖W‖_F` when the factors were written, before any tuning; 0 where dense.
        weighted_error: The same in the weighted norm that the method minimised; `None` for plain SVD.
        losses: The curve of an iterative method's objective, from its start on.
        outcome: Why an iterative method stopped.
    """

    name: str
    out_features: int
    in_features: int
    rank: int
    kind: str
    parameters: int
    error: float | None = None
    weighted_error: float | None = None
    losses: tuple[float, ...] = ()
    outcome: str | None = None

    @classmethod
    def of(
        cls,
        name: str,
        shape: LinearShape,
        spec: Mapping[str, int | str] | int | None,
        form: type[LayerForm] | None = None,
        **measured: Any,
    ) -> LayerRecord:
        """The record of a layer in a form, or dense; the one place where a form's cost gets into reports.

        Args:
            name: Fully qualified name.
            shape: Of the dense weight.
            spec: What the form's `spec()` returns, or the rank of two factors; `None` where the layer is dense.
            form: Of the layer; by default that in two factors.
            measured: `error`, `weighted_error`, `losses`, `outcome`.
        """
        size = (name, shape.out_features, shape.in_features)
        if spec is None:
            return cls(*size, shape.full_rank, DENSE, shape.dense_params, **measured)
        form = form or two_factors(shape)
        told = {"rank": spec} if isinstance(spec, int) else spec
        return cls(*size, form.rank_of(told, shape), form.name, form.parameters_of(told, shape), **measured)


@dataclass(frozen=True)
class CostRecord:
    """What the targeted weights cost in the unit of the budget, which need not be parameters.

    Attributes:
        unit: Such as `"parameters"`, or `"ns"` for measured time.
        kept: As they are now.
        dense: When dense.
    """

    unit: str
    kept: int
    dense: int

    @property
    def ratio(self) -> float:
        """`kept / dense`: what the strategy's `keep_ratio` bounds."""
        return self.kept / self.dense if self.dense else 1.0

    def to_dict(self) -> dict[str, Any]:
        """For reports: the fields and the ratio."""
        return {**asdict(self), "ratio": self.ratio}


@dataclass(frozen=True)
class CompressionRecord:
    """How a model was compressed.

    Attributes:
        method: Class name of the strategy.
        options: Its options, as primitives.
        layers: Every targeted layer.
        notes: What the user should know: fall-backs taken, for instance.
        at_budget: Whether the model has the size that was asked for; a checkpoint on the way to it has not.
        cost: What the layers cost in the unit of the strategy's budget; `None` in files of releases before it.
    """

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    layers: tuple[LayerRecord, ...] = ()
    notes: tuple[str, ...] = ()
    at_budget: bool = True
    cost: CostRecord | None = None

    @property
    def targeted_dense(self) -> int:
        """Parameters of the targeted weights when dense."""
        return sum(layer.out_features * layer.in_features for layer in self.layers)

    @property
    def targeted_kept(self) -> int:
        """Parameters of the targeted weights as they are now."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def keep_ratio(self) -> float:
        """`targeted_kept / targeted_dense`: a share of parameters, whatever the budget was measured in."""
        return self.targeted_kept / self.targeted_dense if self.layers else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Primitives only."""
        fields = asdict(self)
        layers = [{**layer, "losses": list(layer["losses"])} for layer in fields["layers"]]
        return {**fields, "layers": layers, "notes": list(self.notes)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> CompressionRecord:
        """Inverse of `to_dict`; what releases before a field existed have not written is left at its default."""
        layers = tuple(LayerRecord(**{**layer, "losses": tuple(layer.get("losses", ()))}) for layer in fields["layers"])
        notes = tuple(fields["notes"])
        # What was written before the field existed has it in a note.
        at_budget = bool(fields.get("at_budget", not any("has not been reached" in note for note in notes)))
        cost = CostRecord(**fields["cost"]) if fields.get("cost") else None
        return cls(fields["method"], dict(fields["options"]), layers, notes, at_budget, cost)
