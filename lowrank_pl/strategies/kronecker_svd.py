"""Factorisation in the loss's own metric, of every targeted layer."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor, nn

from lowrank_pl.allocation import Allocator, Global, LayerOverride, Measure, Uniform
from lowrank_pl.core import LinearShape, kronecker_groups
from lowrank_pl.core.kronecker import DEFAULT_DAMPING
from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.importance import Extent, Importance, LayerImportance, LayerMoments, SecondMoments
from lowrank_pl.importance.second_moments import check_blocks
from lowrank_pl.nn import FinalForm
from lowrank_pl.strategies.block_by_block import BlockByBlock
from lowrank_pl.strategies.calibration import Calibration
from lowrank_pl.strategies.decomposition import ByGroups, Decomposition
from lowrank_pl.strategies.recalibration import Recalibration
from lowrank_pl.strategies.refit import Refit
from lowrank_pl.strategies.sequential import SequentialStrategy
from lowrank_pl.surgery import TargetSelector


class KroneckerSVD(SequentialStrategy):
    """Minimises `‖G^½ (W − AB) C^½‖_F`, the second-order rise of the loss if the Fisher information is `G ⊗ C`.

    `C` and `G` are the second moments of the layer's inputs and of the gradients at its outputs. What each singular
    group is worth is in units of the loss, so ranks go where they save the most of it, over all layers together.

    References:
        Martens and Grosse, Optimizing neural networks with Kronecker-factored approximate curvature, ICML 2015 (the
        approximation). With side `input` it is the objective of DRONE (Chen et al., NeurIPS 2021) and SVD-LLM (Wang et
        al., ICLR 2025). The allocation is this project's.

    Args:
        side: `both`; or only the moments of the `input` or the `output`, the others taken as equal.
        keep_ratio: Share of what the targeted layers cost to keep, `0 < keep_ratio <= 1`.
        rank_ratio: Instead of keep_ratio, the papers' measure: rank `int(rank_ratio * min(out, in))`.
        multiple_of: Round ranks to multiples, all layers together within keep_ratio.
        overrides: Exceptions for layers by name.
        targets: Which layers to factorise.
        calibration: How the moments are measured.
        damping: Added to the diagonals of both moments, relative to their means.
        cost: What keep_ratio is a share of; see `StaticStrategy`.
        allocation: Which layer gets which rank: by default `Global`, and `Uniform` for side `input`, whose energies say
            nothing of the loss.
        recalibration: See `StaticStrategy`.
        refit: See `StaticStrategy`; `false` leaves the factors as they are. `true` adds nothing where `sequential` has
            fitted them to the outputs of the dense layers already.
        diagonal: Take only the diagonals of the moments: less memory, and close to FWSVD.
        block_size: Take only blocks of so many features along the diagonals, e.g. 64 for the heads of many encoders:
            between the two. It divides the features of every targeted layer.
        form: See `StaticStrategy`.
        sequential: Take ranks as above, and factorise layers in the order of their calls, for the inputs that the
            factorised ones before them give: `true` for `BlockByBlock()`, or one with other settings.
    """

    def __init__(
        self,
        side: Literal["both", "input", "output"] = "both",
        keep_ratio: float | None = None,
        rank_ratio: float | None = None,
        multiple_of: int = 1,
        overrides: list[LayerOverride] | None = None,
        targets: TargetSelector | None = None,
        calibration: Calibration | None = None,
        damping: float = DEFAULT_DAMPING,
        cost: Measure | None = None,
        allocation: Allocator | None = None,
        recalibration: Recalibration | bool | None = None,
        diagonal: bool = False,
        refit: Refit | bool | None = True,
        block_size: int | None = None,
        form: FinalForm = "low_rank",
        sequential: BlockByBlock | bool | None = False,
    ) -> None:
        if not (math.isfinite(damping) and damping >= 0):
            raise RangeError("damping", damping, "0 <= damping, relative to the mean of the diagonal")
        if side not in ("both", "input", "output"):
            raise RangeError("side", side, "'both', 'input' or 'output'")
        self.side = side
        self.damping = damping
        if block_size is not None and (diagonal or type(block_size) is not int or block_size < 1):
            raise RangeError("block_size", block_size, "a whole number from 1, without diagonal, or null")
        self.diagonal = diagonal
        self.block_size = block_size
        self.use_sequential(sequential)
        if refit is True and self.sequential is not None and self.sequential.toward == "dense_outputs":
            refit = False
        allocation = allocation or (Uniform() if side == "input" else Global())
        super().__init__(
            keep_ratio,
            rank_ratio,
            multiple_of,
            overrides,
            targets,
            calibration,
            cost,
            allocation,
            recalibration,
            refit,
            form,
        )

    @property
    def importance(self) -> Importance[LayerMoments]:
        """Second moments of the sides that count."""
        extent: Extent = "diagonal" if self.diagonal else self.block_size or "full"
        return SecondMoments(extent if self.side != "output" else "none", extent if self.side != "input" else "none")

    def check(self, encoder: nn.Module) -> None:
        """Also looks whether blocks fit.

        Raises:
            RangeError: they do not divide the features of a layer.
        """
        super().check(encoder)
        if self.block_size is not None:
            sides = {"both": ("in", "out"), "input": ("in",), "output": ("out",)}[self.side]
            shapes = self.targets.shapes(self.candidates(encoder))
            check_blocks("block_size", self.block_size, shapes, sides)

    def why_no_energies(self) -> str:
        """Without gradients nothing is known of the loss."""
        if self.side != "input":
            return ""
        return "the moments of inputs say how much outputs change, not how much the loss does"

    @classmethod
    def why_no_embeddings(cls) -> str:
        """Empty: a look-up is a linear layer of one-hot inputs, whose moment is a diagonal of frequencies."""
        return ""

    def decompose(self, weight: Tensor, measured: LayerImportance | None, samples: int) -> Decomposition:
        """One decomposition for all ranks."""
        del samples
        assert isinstance(measured, LayerMoments)
        groups = kronecker_groups(weight, measured.inputs, measured.outputs, self.damping)
        # At break-even the dense weight is kept instead; in the pivoted form that is the full rank.
        shape = LinearShape(*weight.shape)
        count = min(shape.full_rank, max(1, self.cost.break_even(shape) - 1))
        return ByGroups(groups.first(count), self.side != "input")

    def options(self) -> dict[str, Any]:
        """Adds the side, the damping and how much of the moments is taken."""
        moments = {"damping": self.damping, "diagonal": self.diagonal, "block_size": self.block_size}
        return {"side": self.side, **super().options(), **moments}
