from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from torch.utils.data import DistributedSampler

from lowrank_pl.data.sampler import EvaluationSampler, LengthGroupedSampler, grouped_by_length

_RANDOM = random.Random(0)
LENGTHS = [_RANDOM.randint(3, 100) for _ in range(1003)]


def sampler(rank: int = 0, world: int = 1, lengths: list[int] | None = LENGTHS, seed: int = 0) -> LengthGroupedSampler:
    return LengthGroupedSampler(len(LENGTHS), 8, lengths, world, rank, seed)


@pytest.mark.parametrize("lengths", [LENGTHS, None])
def test_every_index_once_per_epoch(lengths: list[int] | None) -> None:
    one = sampler(lengths=lengths)
    assert sorted(one) == list(range(len(LENGTHS)))
    assert len(list(one)) == len(one)


def test_epochs_and_seeds_differ_and_repeat() -> None:
    one = sampler()
    first = list(one)
    assert list(one) == first
    one.set_epoch(1)
    assert list(one) != first
    one.set_epoch(0)
    assert list(one) == first
    assert list(sampler(seed=1)) != first


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("lengths", [LENGTHS, None])
def test_processes_share_one_order(world: int, lengths: list[int] | None) -> None:
    shares = [list(sampler(rank, world, lengths)) for rank in range(world)]
    assert {len(share) for share in shares} == {-(-len(LENGTHS) // world)}
    seen = Counter(index for share in shares for index in share)
    assert set(seen) == set(range(len(LENGTHS)))
    assert sum(seen.values()) - len(seen) == -len(LENGTHS) % world


def test_processes_get_similar_lengths_at_the_same_step() -> None:
    shares = [list(sampler(rank, 2)) for rank in range(2)]
    gaps = []
    for start in range(0, 480, 8):
        together = [LENGTHS[index] for share in shares for index in share[start : start + 8]]
        gaps.append(max(together) - min(together))
    assert sum(gaps) / len(gaps) < 10


def test_grouping_saves_padding() -> None:
    def padded(order: list[int]) -> int:
        batches = [[LENGTHS[i] for i in order[at : at + 8]] for at in range(0, len(order), 8)]
        return sum(max(batch) * len(batch) for batch in batches)

    assert padded(list(sampler())) < 0.75 * padded(list(sampler(lengths=None)))


def test_batches_are_not_in_order_of_length() -> None:
    order = grouped_by_length(LENGTHS, 8, torch.Generator().manual_seed(0), window=None)
    firsts = [LENGTHS[order[at]] for at in range(0, 1000, 8)]
    assert firsts != sorted(firsts)
    assert firsts != sorted(firsts, reverse=True)


def test_fewer_samples_than_processes() -> None:
    shares = [list(LengthGroupedSampler(2, 4, [5, 3], 5, rank)) for rank in range(5)]
    assert all(len(share) == 1 for share in shares)
    assert {share[0] for share in shares} == {0, 1}


def test_no_samples() -> None:
    assert grouped_by_length([], 4, torch.Generator()) == []


def test_lightning_leaves_them_alone() -> None:
    assert isinstance(sampler(), DistributedSampler)
    assert isinstance(EvaluationSampler(3), DistributedSampler)


@pytest.mark.parametrize("size", [0, 1, 15, 16])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_evaluation_sees_every_sample_once_in_order(size: int, world: int) -> None:
    samplers = [EvaluationSampler(size, world, rank) for rank in range(world)]
    assert sorted(index for share in samplers for index in share) == list(range(size))
    for share in samplers:
        assert list(share) == sorted(share)
        assert len(share) == len(list(share)) in (size // world, -(-size // world))
