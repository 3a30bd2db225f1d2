"""In which form layers are trained while their ranks shrink, what is observed, and what a reallocation does to them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lowrank_pl.importance import Sensitivity
from lowrank_pl.nn import LinearForm
from lowrank_pl.strategies.rank_plan import RankPlan


class GroupTraining(ABC):
    """What `RankDyna` does to its layers; when it does it, and to which budget, is `RankDyna`'s own affair.

    Args:
        sensitivity: What is observed.
    """

    def __init__(self, sensitivity: Sensitivity) -> None:
        self.sensitivity = sensitivity

    def check(self, plan: RankPlan) -> None:
        """Raises an error for a plan that the layers' form cannot follow, before anything is changed.

        Raises:
            RangeError: a bound asks for ranks that the form does not have.
        """
        del plan

    def bytes(self, plan: RankPlan) -> int:
        """Memory that what is observed takes beside the model."""
        del plan
        return 0

    def reallocation_bytes(self, plan: RankPlan) -> int:
        """Memory that a reallocation takes on top of that, in one process."""
        del plan
        return 0

    def reset(self) -> None:
        """Forgets an earlier run."""
        self.sensitivity.reset()

    @abstractmethod
    def form_of(self, linear: nn.Module, capacity: int) -> LinearForm:
        """The layer to train in the place of a dense one, with room for so many groups."""

    def before_batch(self, layers: Mapping[str, Any], step: int, next_action: int, scale: float) -> None:
        """Prepares the forward pass of a batch.

        Args:
            layers: Those in training, by name.
            step: The optimizer step that the batch belongs to, counted from 1.
            next_action: The step after which ranks are reallocated next.
            scale: By what the gradient of one sample's own loss will be multiplied before the layers see it.
        """
        del layers, step, next_action, scale

    @abstractmethod
    def observe(self, layers: Mapping[str, Any]) -> bool:
        """Looks at gradients that are complete, averaged over processes, and not yet clipped.

        Returns:
            Whether they were finite; otherwise the step does not count.
        """

    def before_checkpoint(self, trainer: pl.Trainer, plan: RankPlan, device: torch.device) -> None:
        """Moves to the first process what each has observed by itself: a checkpoint holds that one's state alone.

        Args:
            trainer: Of several processes, each of which must call it.
            plan: Of the layers.
            device: Of the model.
        """
        del trainer, plan, device

    def resume(self, trainer: pl.Trainer) -> None:
        """Leaves what was restored from a checkpoint to those processes that had it when it was written."""
        del trainer

    @abstractmethod
    def reallocate(
        self, trainer: pl.Trainer, layers: Mapping[str, Any], plan: RankPlan, budget: float, final: bool
    ) -> dict[str, Tensor]:
        """Brings the layers down to a budget, on all processes and wherever Lightning keeps a copy.

        Args:
            trainer: Of the run.
            layers: Those in training, by name.
            plan: What ranks have to keep to.
            budget: In the unit of the plan's cost.
            final: Whether it is the last time.

        Returns:
            Per layer the scores of its groups by which they were chosen.

        Raises:
            OptimizerStateError, HiddenOptimizerStateError, UnknownOptimizerStateError: an optimizer whose state cannot
                follow.
        """
