"""What was done to a model's layers, for reports; it travels in checkpoints beside the layout."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class LayerRecord:
    """One targeted layer.

    Attributes:
        name: Fully qualified name.
        out_features: m.
        in_features: n.
        rank: Rank of the factors; full rank where the layer stayed dense.
        kind: `"low_rank"` or `"dense"`.
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


@dataclass(frozen=True)
class CompressionRecord:
    """How a model was compressed.

    Attributes:
        method: Class name of the strategy.
        options: Its options, as primitives.
        layers: Every targeted layer.
        notes: What the user should know: fall-backs taken, for instance.
    """

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    layers: tuple[LayerRecord, ...] = ()
    notes: tuple[str, ...] = ()

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
        """`targeted_kept / targeted_dense`."""
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
        return cls(fields["method"], dict(fields["options"]), layers, tuple(fields["notes"]))
