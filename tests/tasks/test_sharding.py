"""FSDP2: what two processes train together is what one trains, and what cannot be divided is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lowrank_pl.checkpoint import load_model
from lowrank_pl.errors.parallelism import UnevenValidationError, UnsupportedParallelismError
from lowrank_pl.errors.run import UnsupportedCallbackError
from lowrank_pl.strategies import SVD, CompressionStrategy, NoCompression, RankDyna
from lowrank_pl.strategies.processes import check_parallelism
from lowrank_pl.surgery import read_layout
from lowrank_pl.tasks import callbacks
from lowrank_pl.tasks.distillation import Distillation
from lowrank_pl.tasks.sharding import EvenValidation
from tests.support import sharded_run
from tests.support.forks import Forks
from tests.support.runs import last_checkpoint, make_task, make_trainer
from tests.support.synthetic import SyntheticData
from tests.support.tiny import save_tiny_decoder


def test_two_processes_train_as_one(everything_loaded: Forks, tmp_path: Path) -> None:
    """Also validated on windows that two cannot halve; their checkpoint is whole, loads, and resumes in one process."""
    model = save_tiny_decoder("llama", tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(f"the film {index * index % 10}" for index in range(45)))
    two = tmp_path / "two" / "epoch-1.ckpt"
    variables = {**os.environ, "LOWRANK_PL_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    words = [sharded_run.__file__, str(model), str(two.parent), "2"]
    everything_loaded.run(words, tmp_path, variables, processes=2)
    one = sharded_run.run(str(model), tmp_path / "one", 1)
    files = [torch.load(path, weights_only=True) for path in (one, two)]
    assert files[0]["global_step"] == files[1]["global_step"] > 1
    scores = [_monitored(file) for file in files]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
    whole, divided = (load_model(str(path)) for path in (one, two))
    assert read_layout(whole) == read_layout(divided)
    assert read_layout(whole).modules
    torch.testing.assert_close(whole.state_dict(), divided.state_dict(), rtol=0, atol=1e-6)
    on = [sharded_run.run(str(model), path.parent / "on", 1, path) for path in (one, two)]
    whole, divided = (load_model(str(path)) for path in on)
    torch.testing.assert_close(whole.state_dict(), divided.state_dict(), rtol=0, atol=1e-5)


def _monitored(file: dict[str, Any]) -> float:
    (state,) = (state for name, state in file["callbacks"].items() if "ModelCheckpoint" in name)
    return float(state["current_score"])


class Trainer:
    """As much of a trainer as is looked at."""

    def __init__(self, **arguments: Any) -> None:
        given = {"data_parallel_size": 2, "tensor_parallel_size": 1, "save_distributed_checkpoint": False}
        self.strategy = ModelParallelStrategy(**{**given, **arguments})
        self.callbacks = [StochasticWeightAveraging(1e-3)]


@pytest.mark.parametrize(
    ("make", "changed", "reason"),
    [
        (lambda: RankDyna(keep_ratio=0.5), {}, "scores singular groups by their gradients"),
        (lambda: Untried(), {}, "has not been tried"),
        (NoCompression, {"tensor_parallel_size": "auto"}, "tensor_parallel_size='auto'"),
        (NoCompression, {"save_distributed_checkpoint": True}, "set it to false"),
    ],
)
def test_what_cannot_be_divided_is_refused_with_the_reason(
    tiny_bert: str, make: Any, changed: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy: CompressionStrategy = make()
    task = make_task(tiny_bert, strategy)
    monkeypatch.setattr(type(task), "is_fitting", True)
    with pytest.raises(UnsupportedParallelismError, match=rf"ModelParallelStrategy: .*{reason}.*docs/multi_gpu.md"):
        strategy.check_run(Trainer(**changed), task)  # type: ignore[arg-type]


class Untried(CompressionStrategy):
    """A method of somebody else."""


def test_teachers_averages_and_other_modules_are_refused(tiny_bert: str, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy, trainer = SVD(keep_ratio=0.5), Trainer()
    task = make_task(tiny_bert, strategy)
    with pytest.raises(UnsupportedParallelismError, match="in the verb fit"):
        strategy.check_run(trainer, task)  # type: ignore[arg-type]
    monkeypatch.setattr(type(task), "is_fitting", True)
    strategy.check_run(trainer, task)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedCallbackError, match="StochasticWeightAveraging"):
        callbacks.check_callbacks(trainer, strategy, None)  # type: ignore[arg-type]
    task.expect_checkpoint("last.ckpt")
    with pytest.raises(UnsupportedParallelismError, match="is resumed"):
        strategy.check_run(trainer, task)  # type: ignore[arg-type]
    task.distillation = Distillation(tiny_bert)
    with pytest.raises(UnsupportedParallelismError, match="a teacher"):
        strategy.check_run(trainer, task)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedParallelismError, match="the module does not divide its encoder"):
        strategy.check_run(trainer, torch.nn.Module())  # type: ignore[arg-type]


def test_resuming_is_refused_before_the_data_are_looked_at(tiny_bert: str, tmp_path: Path) -> None:
    dense = make_task(tiny_bert)
    trainer = make_trainer(tmp_path)
    trainer.fit(dense, datamodule=SyntheticData())
    divided = make_trainer(tmp_path / "on", strategy=Trainer(data_parallel_size=1).strategy)
    with pytest.raises(UnsupportedParallelismError, match=r"ModelParallelStrategy: .*is resumed"):
        divided.fit(make_task(tiny_bert), datamodule=SyntheticData(), ckpt_path=last_checkpoint(trainer))


@pytest.mark.parametrize(("kind", "reason"), [(FSDPStrategy, "into one vector"), (DeepSpeedStrategy, "its engine")])
def test_other_ways_of_dividing_name_their_own_reason(kind: Any, reason: str) -> None:
    with pytest.raises(UnsupportedParallelismError, match=f"{kind.__name__}: .*{reason}"):
        check_parallelism(object.__new__(kind), "SVD")


def test_a_process_without_a_sample_to_validate_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Validating:
        sanity_checking, num_val_batches, global_rank, world_size = False, [1], 0, 2

    monkeypatch.setattr("lowrank_pl.tasks.sharding.gathered", lambda _, own: [own, 0])
    with pytest.raises(UnevenValidationError, match="process 1 of 2"):
        EvenValidation().on_validation_start(Validating(), None)  # type: ignore[arg-type]
