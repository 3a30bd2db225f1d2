"""Going on in the middle of an epoch with the batches that a stopped run has not seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from lowrank_pl.errors.data import ResumedDataError


class ResumableData(pl.LightningDataModule):
    """A datamodule whose training loader's place, and what its order depends on, are part of every checkpoint.

    Lightning restores a loader's place only if nothing has asked for the loader before, which is what deriving a
    learning-rate schedule from the length of the run does; a datamodule's own state comes back early enough.
    """

    def __init__(self) -> None:
        super().__init__()
        self._place_to_resume: dict[str, Any] | None = None

    def order_settings(self) -> dict[str, Any]:
        """What the batches of an epoch and their order depend on, in primitives. Known once `setup` has run."""
        return {}

    def resumable(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        """Puts a new training loader where the stopped run was, once; to be returned by `train_dataloader`.

        Raises:
            ResumedDataError: the run was stopped in the middle of an epoch that these settings order otherwise.
        """
        place, self._place_to_resume = self._place_to_resume, None
        if place is not None:
            self._check_settings(place, loader)
        if place is not None and isinstance(loader, StatefulDataLoader):
            # Lightning tells the sampler its epoch only after the loader has asked it for the order of its samples.
            if isinstance(loader.sampler, DistributedSampler):
                loader.sampler.set_epoch(place["epoch"])
            if place["loader"] is not None:
                loader.load_state_dict(place["loader"])
        return loader

    def state_dict(self) -> dict[str, Any]:
        """The epoch and the loader's place in it, primitives and tensors."""
        trainer = self.trainer
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:
            return {}
        if trainer.is_last_batch:
            # A finished loader has no place to go back to: the next epoch starts from its beginning.
            return {"epoch": trainer.current_epoch + 1, "loader": None, "settings": self.order_settings()}
        loader = trainer.train_dataloader
        if not isinstance(loader, StatefulDataLoader):
            return {}
        return {
            "epoch": trainer.current_epoch,
            "loader": loader.state_dict(),
            # Workers hold the place of the loader between them.
            "settings": {**self.order_settings(), "num_workers": loader.num_workers},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Keeps the place for the next training loader."""
        self._place_to_resume = dict(state_dict) or None

    def _check_settings(self, place: Mapping[str, Any], loader: DataLoader[Any]) -> None:
        before: Mapping[str, Any] = place.get("settings", {})
        now = {**self.order_settings(), "num_workers": loader.num_workers}
        differences = [(name, value, now.get(name)) for name, value in before.items() if now.get(name) != value]
        if not differences:
            return
        if place["loader"] is not None:
            raise ResumedDataError(differences)
        told = ", ".join(f"{name} was {old!r} and is {new!r}" for name, old, new in differences)
        rank_zero_warn(f"resuming with other data settings than the checkpoint's run had: {told}.")
