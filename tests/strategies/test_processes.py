"""Which parallelism is supported, and who does what. Two real processes: tests/test_two_processes.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn

from lowrank_pl.core.shapes import LinearShape
from lowrank_pl.errors.numerics import NonFiniteError
from lowrank_pl.errors.parallelism import ProcessFailedError, StartMethodError, UnsupportedParallelismError
from lowrank_pl.importance import FirstOrder, KroneckerSensitivity, SecondMoments
from lowrank_pl.nn import ElasticLinear
from lowrank_pl.strategies import SVD, Calibration, CompressionStrategy, NoCompression, Recalibration
from lowrank_pl.strategies.calibration import measure_importance
from lowrank_pl.strategies.metric_groups import MetricGroups
from lowrank_pl.strategies.processes import Agreement, assign, check_parallelism, check_parallelism_named, work_shared
from lowrank_pl.strategies.singular_groups import SingularGroups
from tests.support.runs import make_task, make_trainer
from tests.support.synthetic import SyntheticData


class Wrapping(DDPStrategy):
    """A plug-in that may do anything."""


@pytest.mark.parametrize("kind", [DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Wrapping])
@pytest.mark.parametrize("make", [NoCompression, lambda: SVD(keep_ratio=0.5)])
@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_what_is_not_listed_is_refused_in_every_verb(kind: Any, make: Any, stage: str, tiny_bert: str) -> None:
    strategy: CompressionStrategy = make()
    task = make_task(tiny_bert, strategy)

    class Trainer:
        strategy = object.__new__(kind)

    with pytest.raises(UnsupportedParallelismError, match=rf"{kind.__name__}.*single device and DDP"):
        strategy.setup(Trainer(), task, stage)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["deepspeed", "deepspeed_stage_3_offload", "DeepSpeedStrategy", "fsdp", "FSDPStrategy"]
)
def test_what_is_refused_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(UnsupportedParallelismError, match=rf"^X cannot work under trainer\.strategy {name}: "):
        check_parallelism_named(name, "X")


@pytest.mark.parametrize(
    "name", ["auto", "ddp", "ddp_find_unused_parameters_true", "ModelParallelStrategy", "None", ""]
)
def test_other_names_pass(name: str) -> None:
    check_parallelism_named(name, "X")


def test_single_devices_and_ddp_are_supported() -> None:
    check_parallelism(SingleDeviceStrategy(), "SVD")
    check_parallelism(DDPStrategy(), "SVD")
    check_parallelism(DDPStrategy(find_unused_parameters=True), "SVD")


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_processes_that_take_the_model_with_them_are_refused(method: Any) -> None:
    with pytest.raises(StartMethodError, match=f"started by '{method}'.*trainer.devices to 1"):
        check_parallelism(DDPStrategy(start_method=method), "SVD")


@pytest.mark.parametrize("verb", ["fit", "validate", "test"])
def test_a_run_is_refused_before_its_data_are_prepared(verb: str, tiny_bert: str, tmp_path: Path) -> None:
    class Data(SyntheticData):
        prepared = False

        def prepare_data(self) -> None:
            Data.prepared = True

    trainer = make_trainer(tmp_path, logger=False)
    trainer.strategy.__class__ = type("OtherStrategy", (SingleDeviceStrategy,), {})
    with pytest.raises(UnsupportedParallelismError, match="OtherStrategy"):
        getattr(trainer, verb)(make_task(tiny_bert), datamodule=Data())
    assert not Data.prepared


def test_jobs_are_divided_by_their_costs() -> None:
    owners = assign({"a": 1.0, "b": 8.0, "c": 3.0, "d": 4.0, "e": 2.0}, 2)
    assert owners == {"a": 0, "b": 0, "c": 1, "d": 1, "e": 1}
    assert list(owners) == ["a", "b", "c", "d", "e"]
    assert assign({"a": 1.0, "b": 1.0}, 1) == {"a": 0, "b": 0}
    assert assign({"a": 1.0}, 3) == {"a": 0}
    assert assign({}, 2) == {}


def test_equal_jobs_are_divided_evenly() -> None:
    owners = assign({str(index): 5.0 for index in range(10)}, 3)
    assert sorted(list(owners.values()).count(rank) for rank in range(3)) == [3, 3, 4]


def test_one_process_does_everything_and_its_own_errors_come_out(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, logger=False)
    assert work_shared(trainer, {"a": 0, "b": 0}, str.upper, "Work") == {"a": "A", "b": "B"}

    def fail(job: str) -> None:
        raise NonFiniteError(job)

    with pytest.raises(NonFiniteError, match="b"):
        work_shared(trainer, {"b": 0}, fail, "Work")


class TwoProcesses:
    """A trainer of the first of two processes; what the second one gathers is given beforehand."""

    world_size, global_rank, is_global_zero, progress_bar_callback = 2, 0, True, None
    received_sigterm = False

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *theirs: Any) -> None:
        self.told: list[Any] = []
        rest = list(theirs)

        def gather(values: list[Any], mine: Any) -> None:
            self.told.append(mine)
            values[:] = [mine, rest.pop(0)]

        monkeypatch.setattr(torch.distributed, "all_gather_object", gather)


def test_an_error_elsewhere_is_raised_here(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer: Any = TwoProcesses(monkeypatch, "NonFiniteError: no.")
    with pytest.raises(ProcessFailedError, match=r"process 1 of this run has failed: NonFiniteError: no\. This"):
        work_shared(trainer, {"a": 0, "b": 1}, str.upper, "Work")
    assert trainer.told == [None]


def test_an_error_here_is_told_and_raised_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer: Any = TwoProcesses(monkeypatch, None)
    with pytest.raises(NonFiniteError), Agreement(trainer):
        raise NonFiniteError("here")
    assert len(trainer.told) == 1
    assert "here" in trainer.told[0]


def test_a_choice_of_ranks_that_fails_is_told_to_those_that_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer: Any = TwoProcesses(monkeypatch, None)

    def choose(*_: Any) -> Any:
        raise NonFiniteError("the scores")

    plan: Any = SimpleNamespace(choose=choose)
    with pytest.raises(NonFiniteError):
        SingularGroups(FirstOrder(), True, 1).reallocate(trainer, {}, plan, 1.0, True)
    assert len(trainer.told) == 1
    assert "the scores" in trainer.told[0]


class Broken(SyntheticData):
    """Data of which one process cannot read its share, nor the first the whole."""

    def calibration_batches(self, *arguments: Any, **others: Any) -> Any:
        return self

    num_samples = 4

    @property
    def fingerprint(self) -> str:
        raise OSError("a file is gone")

    def __iter__(self) -> Any:
        raise OSError("a file is gone")


def test_samples_that_cannot_be_read_are_told_to_those_that_wait_for_the_cache_and_the_outputs(
    tiny_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(tiny_bert)
    task.build(SyntheticData().target)
    layers = {"classifier": task.encoder.classifier}
    calibration = Calibration(cache_dir=str(tmp_path))
    for read in (
        lambda trainer: measure_importance(trainer, task, layers, SecondMoments(), calibration, "X"),
        lambda trainer: Recalibration().outputs(trainer, task, calibration),
    ):
        trainer: Any = TwoProcesses(monkeypatch, None)
        trainer.strategy, trainer.datamodule, trainer.precision = SingleDeviceStrategy("cpu"), Broken(), "32-true"
        with pytest.raises(OSError, match="a file is gone"):
            read(trainer)
        assert len(trainer.told) == 1
        assert "a file is gone" in trainer.told[0]


def test_a_layer_that_cannot_be_decomposed_is_told_to_those_that_wait_for_its_energies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer: Any = TwoProcesses(monkeypatch, None)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda _: None)
    linear = nn.Linear(6, 4)
    nn.init.constant_(linear.weight, torch.nan)
    groups = MetricGroups(KroneckerSensitivity(), 0.25, 1, True)
    groups.sensitivity.add("layer", torch.randn(8, 6), torch.randn(8, 4))
    plan: Any = SimpleNamespace(shapes={"layer": LinearShape(4, 6)})
    with pytest.raises(NonFiniteError, match="layer"):
        groups.reallocate(trainer, {"layer": ElasticLinear.from_linear(linear)}, plan, 0.5, False)
    assert len(trainer.told) == 1
    assert "layer" in trainer.told[0]


def test_ranks_that_fail_after_the_energies_are_told_to_those_that_wait_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer: Any = TwoProcesses(monkeypatch, None, {}, None)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda _: None)

    def best(*_: Any) -> Any:
        raise NonFiniteError("the energies")

    plan: Any = SimpleNamespace(shapes={"layer": LinearShape(4, 6)}, best=best)
    groups = MetricGroups(KroneckerSensitivity(), 0.25, 1, True)
    groups.sensitivity.add("layer", torch.randn(8, 6), torch.randn(8, 4))
    with pytest.raises(NonFiniteError, match="the energies"):
        groups.reallocate(trainer, {"layer": ElasticLinear.from_linear(nn.Linear(6, 4))}, plan, 0.5, False)
    assert len(trainer.told) == 3
    assert "the energies" in trainer.told[2]


def test_a_process_that_was_asked_to_stop_starts_no_further_job_and_tells_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer: Any = TwoProcesses(monkeypatch, None)
    begun: list[str] = []

    def begin(job: str) -> None:
        begun.append(job)
        trainer.received_sigterm = True

    with pytest.raises(SIGTERMException):
        work_shared(trainer, {"a": 0, "b": 0}, begin, "Work")
    assert (begun, trainer.told) == (["a"], ["SIGTERMException: "])


def test_an_error_after_all_have_settled_is_not_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer: Any = TwoProcesses(monkeypatch, None)
    agreement = Agreement(trainer)

    def settle_and_fail() -> None:
        with agreement:
            agreement.settle()
            raise NonFiniteError("everywhere")

    with pytest.raises(NonFiniteError, match="everywhere"):
        settle_and_fail()
    assert trainer.told == [None]


def test_results_come_in_the_order_of_the_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer: Any = TwoProcesses(monkeypatch, None, {"a": "A"})
    found = work_shared(trainer, {"a": 1, "b": 0}, str.upper, "Work")
    assert list(found.items()) == [("a", "A"), ("b", "B")]
    assert trainer.told == [None, {"b": "B"}]
