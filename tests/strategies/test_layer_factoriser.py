"""What all static methods do to layers, by the simplest of them. Two real processes: tests/test_two_processes.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_pl.core.svd import truncated_svd
from lowrank_pl.nn import LowRankLinear, PivotedLinear
from lowrank_pl.strategies import SVD
from lowrank_pl.strategies.layer_factoriser import LayerFactoriser
from tests.support.runs import make_task, make_trainer


@pytest.fixture
def run(tiny_bert: str, tmp_path: Path) -> LayerFactoriser:
    task = make_task(tiny_bert, SVD(keep_ratio=0.5))
    task.build()
    for parameter in task.encoder.parameters():  # biases that are zero would tell nothing
        nn.init.normal_(parameter)
    return LayerFactoriser(task.strategy, make_trainer(tmp_path), task, task.strategy.candidates(task.encoder))


def test_exchanged_layers_are_the_best_of_their_ranks_with_their_biases(run: LayerFactoriser) -> None:
    dense: dict[str, Any] = dict(run.layers)
    ranks = {name: 3 + index % 2 for index, name in enumerate(dense)}
    decompositions = run.decompose_all(dense)
    told = run.exchange_(ranks, decompositions)
    assert not decompositions  # each goes when it has been used
    assert list(told) == list(ranks)
    for name, rank in ranks.items():
        made, weight = run.encoder.get_submodule(name), dense[name].weight.detach()
        best = truncated_svd(weight, rank).product()
        assert isinstance(made, LowRankLinear)
        torch.testing.assert_close(made.weight, best)
        assert made.bias is not None
        assert torch.equal(made.bias, dense[name].bias)
        assert told[name]["error"] == pytest.approx(float((weight - best).norm() / weight.norm()), rel=1e-4)


def test_restated_layers_are_the_same_functions(run: LayerFactoriser) -> None:
    name, x = next(iter(run.layers)), torch.randn(4, 32)
    run.exchange_({name: 3}, run.decompose_all([name]))
    before: Tensor = run.encoder.get_submodule(name)(x)
    run.restate_(PivotedLinear, [name])
    assert isinstance(run.encoder.get_submodule(name), PivotedLinear)
    torch.testing.assert_close(run.encoder.get_submodule(name)(x), before)


def test_two_processes_have_as_much_to_decompose(run: LayerFactoriser) -> None:
    class Second:
        """A trainer of the second of two processes."""

        world_size, global_rank, is_global_zero, progress_bar_callback, received_sigterm = 2, 1, False, None, False

    second: Any = Second()
    strategy = SVD(keep_ratio=0.5)
    owners = LayerFactoriser(strategy, second, run.pl_module, run.layers).owners
    loads = [0.0, 0.0]
    for name, shape in strategy.targets.shapes(run.layers).items():
        loads[owners[name]] += shape.dense_params * shape.full_rank
    assert owners.keys() == run.layers.keys()
    assert loads[0] == loads[1]
    assert set(run.owners.values()) == {0}
