"""Calibration batches over a data set of anybody's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from lowrank_pl.data import DatasetBatches

DATA = TensorDataset(torch.arange(11), torch.arange(11) * 2)


def samples(batches: DatasetBatches) -> list[int]:
    return [int(index) for batch in batches for index in batch[0]]


def test_all_processes_together_have_every_sample_once_in_batches_of_the_size() -> None:
    shares = [DatasetBatches(DATA, 4, rank=rank, world_size=2) for rank in (0, 1)]
    assert sorted(samples(shares[0]) + samples(shares[1])) == list(range(11))
    assert [share.num_samples for share in shares] == [11, 11]
    assert [len(share) for share in shares] == [2, 2]
    assert [len(batch[0]) for batch in shares[0]] == [4, 2]
    assert shares[0].fingerprint == shares[1].fingerprint


def test_a_choice_is_repeatable_and_depends_on_the_seed() -> None:
    chosen = [DatasetBatches(DATA, 4, max_samples=5, seed=seed) for seed in (0, 0, 1)]
    assert samples(chosen[0]) == samples(chosen[0]) == samples(chosen[1]) != samples(chosen[2])
    assert chosen[0].num_samples == 5
    assert chosen[0].fingerprint == chosen[1].fingerprint != chosen[2].fingerprint


def test_the_fingerprint_tells_content_and_collation() -> None:
    def doubled(rows: list[Any]) -> Tensor:
        return torch.stack([row[0] * 2 for row in rows])

    other = TensorDataset(torch.arange(11), torch.arange(11) * 3)
    prints = {DatasetBatches(data, 4, collate=c).fingerprint for data in (DATA, other) for c in (doubled, tuple)}
    assert len(prints) == 4
    assert torch.equal(next(iter(DatasetBatches(DATA, 3, collate=doubled))), torch.tensor([0, 2, 4]))
