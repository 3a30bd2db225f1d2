"""Batches of tokenised splits, for every verb and any number of processes."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from datasets import Dataset
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from lowrank_pl.data.collate import Collator
from lowrank_pl.data.resuming import ResumableData
from lowrank_pl.data.sampler import EvaluationSampler, LengthGroupedSampler, grouped_by_length
from lowrank_pl.errors.data import TooFewSamplesError


class BatchLoaders(ResumableData, ABC):
    """The loaders of a datamodule that has its splits in memory.

    Args:
        batch_size: Training samples per batch and process.
        eval_batch_size: Samples per batch and process in validation, testing and prediction.
        num_workers: Processes that prepare batches; 0 prepares them in the training process.
        length_grouping: Put texts of similar length in a training batch.
        seed: Decides the order of training samples.
    """

    hides_test_labels: ClassVar[bool] = False
    """Whether a test split without labels is as it should be."""

    def __init__(
        self, batch_size: int, eval_batch_size: int, num_workers: int, length_grouping: bool, seed: int
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.length_grouping = length_grouping
        self.seed = seed

    # What a subclass says.

    @property
    @abstractmethod
    def data_name(self) -> str:
        """Name of the data in messages."""

    @property
    @abstractmethod
    def has_labelled_test(self) -> bool:
        """Whether there is a test split with labels."""

    @abstractmethod
    def split(self, name: str) -> Dataset:
        """A tokenised split."""

    @abstractmethod
    def lengths(self, split: str) -> list[int]:
        """Tokens of each sample of a split."""

    @abstractmethod
    def content(self, split: str) -> str:
        """Identifies the rows of a split."""

    @abstractmethod
    def split_to_predict(self) -> str:
        """The split that `predict` runs on."""

    def split_to_test(self) -> str:
        """The split that `test` scores."""
        return "test" if self.has_labelled_test else "validation"

    @abstractmethod
    def train_collator(self) -> Collator:
        """Makes training batches."""

    @abstractmethod
    def eval_collator(self, seed: int | None = None) -> Collator:
        """Makes batches for evaluation."""

    # Lightning's hooks.

    def train_dataloader(self) -> DataLoader[Any]:
        """The training split, in an order that the seed and the epoch decide."""
        dataset = self.split("train")
        sampler = self._in_file_order(dataset) or self._training_order(dataset)
        with warnings.catch_warnings():
            # About a call inside torchdata, which no user can change.
            warnings.filterwarnings("ignore", message=".*set_vital.*")
            loader = self._loader(dataset, self.batch_size, self.train_collator(), sampler, StatefulDataLoader)
        return self.resumable(loader)

    def val_dataloader(self) -> DataLoader[Any]:
        """The validation split, in batches of similar length."""
        return self._eval_loader("validation")

    def test_dataloader(self) -> DataLoader[Any]:
        """The test split if it is labelled, else the validation split: the test files of GLUE carry no labels."""
        loader = self._eval_loader(split := self.split_to_test())
        if split == "validation":
            tell = rank_zero_info if self.hides_test_labels or self.split_to_predict() != "test" else rank_zero_warn
            tell(f"{self.data_name}: no test split with labels; what test scores is the validation split.")
        return loader

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test split, labelled or not, else the validation split, in the order of the file."""
        split = self.split_to_predict()
        return self.loader_in_order(split, self.split(split))

    # The order of samples.

    def order_settings(self) -> dict[str, Any]:
        """What the batches of an epoch and their order depend on; see `ResumableData`."""
        return {
            "batch_size": self.batch_size,
            "processes": self._place()[1],
            "length_grouping": self.length_grouping,
            "seed": self.seed,
            "training data": self.content("train"),
        }

    def loader_in_order(self, split: str, dataset: Dataset) -> DataLoader[Any]:
        """Batches of a split for `predict`: in its order, each sample on one process."""
        shares = self._shares(split, len(dataset))
        return self._loader(dataset, self.eval_batch_size, self.eval_collator(), shares)

    def _training_order(self, dataset: Dataset) -> Sampler[int]:
        rank, world_size = self._place()
        return LengthGroupedSampler(
            len(dataset),
            self.batch_size,
            self.lengths("train") if self.length_grouping else None,
            num_replicas=world_size,
            rank=rank,
            seed=self.seed,
        )

    def _in_file_order(self, dataset: Dataset) -> Sampler[int] | None:
        """The order of an experiment with `overfit_batches`, in which Lightning shuffles nothing; else `None`.

        Lightning would make the same replacement, in a loader that has lost its place, with a warning. Several
        processes are left to it: only Lightning can share out its own sampler.
        """
        trainer = self.trainer
        if trainer is None or trainer.state.fn != TrainerFn.FITTING or not getattr(trainer, "overfit_batches", 0):
            return None
        return SequentialSampler(dataset) if self._place()[1] == 1 else None

    def _eval_loader(self, split: str) -> DataLoader[Any]:
        # Batches of similar length in random order: sorting all would make the first batches, which
        # limit_val_batches keeps, the shortest texts. The order is fixed by the seed.
        dataset = self.split(split)
        shares = self._shares(split, len(dataset))
        generator = torch.Generator().manual_seed(self.seed)
        together = self.eval_batch_size * shares.num_replicas
        order = grouped_by_length(self.lengths(split), together, generator, window=None)
        ordered = dataset.select(order)
        sampler = self._in_file_order(ordered) or shares
        return self._loader(ordered, self.eval_batch_size, self.eval_collator(), sampler)

    def _shares(self, split: str, size: int) -> EvaluationSampler:
        rank, world_size = self._place()
        # A process without a batch would leave the others waiting for its part of the score.
        if size < world_size:
            name = f"{split} split of {self.data_name}"
            raise TooFewSamplesError(name, size, world_size, "for every process to have one", "Lower trainer.devices.")
        return EvaluationSampler(size, world_size, rank)

    def _place(self) -> tuple[int, int]:
        """Returns this process and how many there are."""
        where = (self.trainer.distributed_sampler_kwargs if self.trainer is not None else None) or {}
        return where.get("rank", 0), where.get("num_replicas", 1)

    def _loader(
        self,
        dataset: Dataset,
        batch_size: int,
        collate: Collator,
        sampler: Sampler[int],
        kind: type[DataLoader[Any]] = DataLoader,
    ) -> DataLoader[Any]:
        return kind(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            # A loader without one draws a seed from the global random state, and a run that skips an evaluation, as one
            # does that is resumed after it, would go on with other dropout masks.
            generator=torch.Generator().manual_seed(self.seed),
            collate_fn=collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
