"""Lightning's own features under every kind of method: what `docs/lightning.md` promises."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch._dynamo
import yaml
from lightning.pytorch import callbacks as plc
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.tuner.tuning import Tuner
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lowrank_pl.allocation import CubicSchedule
from lowrank_pl.errors.run import (
    FrozenFactorsError,
    MonitorModeError,
    UnsupportedCallbackError,
)
from lowrank_pl.monitoring import RankDashboard, RankHistory, ReportWriter
from lowrank_pl.nn import LowRankLinear
from lowrank_pl.strategies import FWSVD, SVD, CompressionStrategy, NoCompression, RankDyna
from lowrank_pl.tasks import MaskedLM, SequenceClassification
from lowrank_pl.tasks.budget_score import is_score, no_score, stand_in
from tests.support.runs import make_task, make_trainer
from tests.support.synthetic import SyntheticData
from tests.support.tiny import save_tiny_model

Make = Callable[[], CompressionStrategy]
STRATEGIES: dict[str, Make] = {
    "none": NoCompression,
    "fwsvd": lambda: FWSVD("both", keep_ratio=0.5),
    "rankdyna": lambda: RankDyna(keep_ratio=0.4),
}


@pytest.fixture(params=list(STRATEGIES.values()), ids=list(STRATEGIES))
def make(request: pytest.FixtureRequest) -> Make:
    made: Make = request.param
    return made


def fit(task: Any, folder: Path, **arguments: Any) -> pl.Trainer:
    trainer = make_trainer(folder, **{"limit_train_batches": 4, **arguments})
    trainer.fit(task, datamodule=SyntheticData())
    return trainer


def check(task: Any, layers: int = 12) -> None:
    """The method has done its work, and nothing went wrong in the numbers."""
    if not isinstance(task.strategy, NoCompression):
        found = [m for m in task.encoder.modules() if isinstance(m, LowRankLinear)]
        assert len(found) == layers
        assert all(bool(m.product().any()) for m in found)
        assert task.compression.keep_ratio <= 0.5
    assert all(bool(torch.isfinite(p).all()) for p in task.parameters())


# Trainer's arguments.

ARGUMENTS: dict[str, dict[str, Any]] = {
    "16-true": {"precision": "16-true"},
    "bf16-true": {"precision": "bf16-true"},
    "bf16-mixed": {"precision": "bf16-mixed", "gradient_clip_val": 1.0},
    "64-true": {"precision": "64-true"},
    "overfit_batches": {"overfit_batches": 2},
    "limit_val_batches": {"limit_val_batches": 0, "gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
    # Arguments that have nothing to do with each other are tried together.
    "accumulate": {
        "accumulate_grad_batches": 2,
        "deterministic": True,
        "val_check_interval": 2,
        "max_time": "00:01:00:00",
    },
    "reload": {
        "reload_dataloaders_every_n_epochs": 1,
        "max_epochs": 2,
        "detect_anomaly": True,
        "num_sanity_val_steps": 2,
        "gradient_clip_val": 0.1,
    },
    "no_logger": {"logger": False, "callbacks": [ReportWriter(), RankHistory(), RankDashboard()]},
    "barebones": {
        "barebones": True,
        "logger": None,
        "enable_progress_bar": None,
        "enable_model_summary": None,
        "log_every_n_steps": None,
        "num_sanity_val_steps": None,
    },
}


@pytest.mark.parametrize("arguments", list(ARGUMENTS.values()), ids=list(ARGUMENTS))
def test_trainer_arguments(tiny_bert: str, tmp_path: Path, make: Make, arguments: dict[str, Any]) -> None:
    # Fused, as in every recipe; Adam's usual epsilon of 1e-8 is zero in float16.
    optimizer = lambda params: torch.optim.AdamW(params, lr=1e-3, eps=1e-4, fused=True)  # noqa: E731
    task = make_task(tiny_bert, make(), optimizer=optimizer)
    fit(task, tmp_path, **arguments)
    check(task)


# Callbacks.

# What changes the run one at a time, what only looks on together.
CALLBACKS: dict[str, Callable[[Path], list[pl.Callback]]] = {
    "ModelCheckpoint, EarlyStopping": lambda p: [
        plc.ModelCheckpoint(p, monitor="val/score_at_budget", mode="max", save_last=True),
        plc.EarlyStopping("val/score_at_budget", mode="max"),
    ],
    "GradientAccumulationScheduler": lambda p: [plc.GradientAccumulationScheduler({0: 1, 1: 2})],
    "monitors": lambda p: [
        plc.LearningRateMonitor("step", log_momentum=True),
        plc.Timer("00:01:00:00"),
        plc.RichProgressBar(),
        plc.RichModelSummary(2),
        plc.DeviceStatsMonitor(cpu_stats=False),
        plc.LambdaCallback(on_train_batch_end=lambda *a: None),
        plc.OnExceptionCheckpoint(p),
        plc.ThroughputMonitor(batch_size_fn=lambda batch: len(batch["labels"]), window_size=2),
    ],
}


@pytest.mark.parametrize("callbacks", list(CALLBACKS.values()), ids=list(CALLBACKS))
def test_callbacks(tiny_bert: str, tmp_path: Path, make: Make, callbacks: Callable[[Path], list[pl.Callback]]) -> None:
    task = make_task(tiny_bert, make())
    made = callbacks(tmp_path)
    bar = any(isinstance(callback, plc.ProgressBar) for callback in made)
    trainer = fit(task, tmp_path, callbacks=made, max_epochs=2, limit_train_batches=1.0, enable_progress_bar=bar)
    check(task)
    assert trainer.current_epoch == 2


def test_freezing_at_first(tiny_bert: str, tmp_path: Path, make: Make) -> None:
    class Finetuning(plc.BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.encoder.base_model)

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: torch.optim.Optimizer) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.encoder.base_model, optimizer)

    task = make_task(tiny_bert, make(), scheduler=lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0))
    if isinstance(task.strategy, RankDyna):
        with pytest.raises(FrozenFactorsError):
            fit(task, tmp_path, callbacks=[Finetuning()], max_epochs=2)
        return
    trainer = fit(task, tmp_path, callbacks=[Finetuning()], max_epochs=2)
    check(task)
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert {id(p) for p in task.encoder.parameters() if p.requires_grad} == held


def test_backbone_finetuning_is_refused_by_lightning(tiny_bert: str, tmp_path: Path, make: Make) -> None:
    with pytest.raises(AttributeError, match="backbone"):
        fit(make_task(tiny_bert, make()), tmp_path, callbacks=[plc.BackboneFinetuning()])


def test_pruning_is_refused(tiny_bert: str, tmp_path: Path, make: Make) -> None:
    with pytest.raises(UnsupportedCallbackError, match="ModelPruning cannot be used here"):
        fit(make_task(tiny_bert, make()), tmp_path, callbacks=[plc.ModelPruning("l1_unstructured", amount=0.5)])


# Tuners.


def test_batch_size_is_found_and_the_schedule_follows(tiny_bert: str, tmp_path: Path, make: Make) -> None:
    task, data = make_task(tiny_bert, make(), warmup=0.0), SyntheticData()
    finder = plc.BatchSizeFinder(max_trials=1, init_val=16)
    trainer = make_trainer(tmp_path, callbacks=[finder])
    trainer.fit(task, datamodule=data)
    assert data.batch_size == 16 == finder.optimal_batch_size
    assert trainer.global_step == 3  # 6 with the 8 that the schedule was first made for
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.0
    check(task)


# Without a method it is Lightning's own affair, as is the rest of what a Tuner does.
@pytest.mark.parametrize("name", ["fwsvd", "rankdyna"])
def test_tuner_scales_the_batch_size(tiny_bert: str, tmp_path: Path, name: str) -> None:
    task, data = make_task(tiny_bert, STRATEGIES[name]()), SyntheticData()
    trainer = make_trainer(tmp_path)
    assert Tuner(trainer).scale_batch_size(task, datamodule=data, max_trials=1, init_val=16) == 16
    trainer.fit(task, datamodule=data)
    check(task)


@pytest.mark.parametrize(
    ("name", "with_tuner"),
    [("none", False), ("fwsvd", False), ("rankdyna", False), ("fwsvd", True), ("rankdyna", True)],
)
def test_learning_rate_is_found_and_kept(tiny_bert: str, tmp_path: Path, name: str, with_tuner: bool) -> None:
    task = make_task(tiny_bert, STRATEGIES[name](), warmup=0.0)
    rates: list[set[float]] = []

    class Rates(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
            rates.append({group["lr"] for group in trainer.optimizers[0].param_groups})

    found: float | None
    if with_tuner:
        trainer = make_trainer(tmp_path)
        finder = Tuner(trainer).lr_find(task, datamodule=SyntheticData(), num_training=12, update_attr=False)
        assert finder is not None
        assert len(finder.results["lr"]) > 5
        trainer.fit(task, datamodule=SyntheticData())
    else:
        callback = plc.LearningRateFinder(num_training_steps=20)
        trainer = make_trainer(tmp_path, callbacks=[callback, Rates()], max_epochs=4)
        trainer.fit(task, datamodule=SyntheticData())
        assert callback.optimal_lr is not None
        found = callback.optimal_lr.suggestion()
        assert found is not None
        assert all(len(groups) == 1 for groups in rates)
        assert [next(iter(groups)) for groups in rates] == pytest.approx([found * (24 - s) / 24 for s in range(24)])
    check(task)


# Monitors.


@pytest.mark.parametrize("kind", ["classification", "masked_lm"])
def test_early_stopping_waits_for_the_budget(tiny_bert: str, tmp_path: Path, kind: Any) -> None:
    """With the least patience there is: it must not run out before there is a score."""
    maker = MaskedLM if kind == "masked_lm" else make_task
    mode = "min" if kind == "masked_lm" else "max"
    pl.seed_everything(0, verbose=False)
    task: Any = maker(tiny_bert, strategy=RankDyna(keep_ratio=0.4))
    best = plc.ModelCheckpoint(tmp_path, "best", monitor="val/score_at_budget", mode=mode)
    stopping = plc.EarlyStopping("val/score_at_budget", mode=mode, patience=1, min_delta=0.01)
    seen: list[float] = []

    class Scores(pl.Callback):
        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            seen.append(float(trainer.callback_metrics["val/score_at_budget"]))

    trainer = make_trainer(tmp_path, max_epochs=8, callbacks=[Scores(), stopping, best], logger=CSVLogger(tmp_path))
    trainer.fit(task, datamodule=SyntheticData(kind))
    assert task.at_budget
    assert [is_score(value) for value in seen[:5]] == [False, False, False, True, True]
    assert best.best_model_score is not None
    assert is_score(float(best.best_model_score))
    logged = (Path(str(trainer.log_dir)) / "metrics.csv").read_text(encoding="utf-8")
    rows = [line.split(",") for line in logged.splitlines()]
    column = rows[0].index("val/score_at_budget")
    shown = [float(row[column]) for row in rows[1:] if row[column]]
    assert shown == pytest.approx(seen[3:], abs=1e-5)  # only scores


def test_tensorboard_shows_scores_at_the_budget_only(tiny_bert: str, tmp_path: Path) -> None:
    task = make_task(tiny_bert, RankDyna(keep_ratio=0.4))
    trainer = fit(task, tmp_path, max_epochs=4, logger=TensorBoardLogger(tmp_path))
    events = EventAccumulator(str(trainer.log_dir))
    events.Reload()
    assert all(0 <= event.value <= 1 for event in events.Scalars("val/score_at_budget"))
    assert len(events.Scalars("val/score_at_budget")) in (2, 3)


def test_what_stands_for_a_score() -> None:
    better, worse = SyntheticData().target, SyntheticData("masked_lm").target
    assert [stand_in(better, left) for left in (100, 1, 0)] == [-102, -3, -2]
    values = [float(torch.tensor(stand_in(worse, left))) for left in (1e7, 100_001, 100_000, 1, 0)]
    assert all(later < earlier < float("inf") for earlier, later in itertools.pairwise(values))
    assert not any(is_score(value) for value in (*values, -2.0, no_score(better), no_score(worse), float("nan")))
    assert is_score(-1.0)
    assert is_score(1e20)  # a perplexity


@pytest.mark.parametrize("monitor", ["val/score", "val/loss"])
def test_monitors_that_do_not_know_the_budget_are_told(
    tiny_bert: str, tmp_path: Path, monitor: str, caplog: pytest.LogCaptureFixture
) -> None:
    mode = "max" if monitor == "val/score" else "min"
    callbacks = [plc.ModelCheckpoint(tmp_path, monitor=monitor, mode=mode), plc.EarlyStopping(monitor, mode=mode)]
    fit(make_task(tiny_bert, SVD(keep_ratio=0.5)), tmp_path, callbacks=callbacks)
    assert "at the budget" not in caplog.text
    trainer = fit(make_task(tiny_bert, RankDyna(keep_ratio=0.4)), tmp_path, callbacks=[*callbacks, ReportWriter()])
    assert f"a ModelCheckpoint monitors '{monitor}' and may keep a model from before RankDyna" in caplog.text
    assert f"EarlyStopping monitors '{monitor}' and may end the run before RankDyna" in caplog.text
    report = Path(str(trainer.log_dir)) / "report.md"
    assert "at the budget" in report.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("monitor", "told"), [("val/score", "**above the budget**"), ("val/score_at_budget", "at the")]
)
def test_the_report_tells_whether_the_best_checkpoint_is_at_the_budget(
    tiny_bert: str, tmp_path: Path, monitor: str, told: str
) -> None:
    class First(plc.ModelCheckpoint):
        """Keeps the first model of all, as a monitor would whose best value comes early."""

        def check_monitor_top_k(self, trainer: pl.Trainer, current: Any = None) -> bool:
            return (
                not self.best_k_models if self.monitor == "val/score" else super().check_monitor_top_k(trainer, current)
            )

    callbacks = [First(tmp_path, monitor=monitor, mode="max"), ReportWriter()]
    trainer = fit(make_task(tiny_bert, RankDyna(keep_ratio=0.4)), tmp_path, callbacks=callbacks, max_epochs=3)
    assert told in (Path(str(trainer.log_dir)) / "report.md").read_text(encoding="utf-8")


def test_early_stopping_for_the_worst_score_is_refused(tiny_bert: str, tmp_path: Path) -> None:
    with pytest.raises(MonitorModeError, match="an EarlyStopping monitors 'val/score' with mode='min'"):
        fit(make_task(tiny_bert), tmp_path, callbacks=[plc.EarlyStopping("val/score", mode="min")])


def test_released_trainer_configuration_selects_at_the_budget() -> None:
    path = Path(__file__).parents[2] / "configs" / "trainer" / "default.yaml"
    callbacks = yaml.safe_load(path.read_text(encoding="utf-8"))["trainer"]["callbacks"]
    monitors = [c.get("init_args", {}).get("monitor") for c in callbacks]
    assert [monitor for monitor in monitors if monitor] == ["val/score_at_budget"]


# torch.compile.


class Compilations:
    """A backend that runs as it is and counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        del inputs
        self.count += 1
        return graph.forward


class SameLengths(SyntheticData):
    """Batches of one shape, so that shapes are no reason to compile again."""

    def setup(self, stage: str) -> None:
        for sample in self.train:
            for key in ("input_ids", "attention_mask"):
                sample[key] = torch.nn.functional.pad(sample[key], (0, 12 - len(sample[key])))


def test_compiled_layers_are_not_compiled_anew_for_every_rank(tiny_bert: str, tmp_path: Path) -> None:
    backend = Compilations()

    class CompiledBlocks(SequenceClassification):
        def configure_model(self) -> None:
            super().configure_model()
            layers: Any = self.encoder.get_submodule("bert.encoder.layer")
            for block in layers:
                block.intermediate.dense.compile(backend=backend)

    torch._dynamo.reset()
    before = torch._dynamo.config.recompile_limit, torch._dynamo.config.allow_unspec_int_on_nn_module
    pl.seed_everything(0, verbose=False)
    strategy = RankDyna(keep_ratio=0.4, schedule=CubicSchedule(0.0, 0.2, 0.02))
    task = CompiledBlocks(tiny_bert, strategy=strategy)
    make_trainer(tmp_path, max_epochs=5, limit_val_batches=0).fit(task, datamodule=SameLengths())
    ranks = [tuple(r for n, r in entry.ranks.items() if "intermediate" in n) for entry in strategy.state.history]
    assert len(set(ranks)) > 10
    assert 1 <= backend.count <= 6
    after = torch._dynamo.config.recompile_limit, torch._dynamo.config.allow_unspec_int_on_nn_module
    assert after == before
    check(task)


def test_a_compiled_task_trains(tmp_path: Path) -> None:
    backend = Compilations()
    torch._dynamo.reset()
    flat = str(save_tiny_model("bert", tmp_path / "flat", layers=1))  # each layer takes seconds to trace
    task = make_task(flat, RankDyna(keep_ratio=0.4, allow_dense=False))
    model: Any = torch.compile(task, backend=backend)
    trainer = make_trainer(tmp_path, limit_train_batches=1, limit_val_batches=0)
    trainer.fit(model, datamodule=SameLengths())
    assert backend.count >= 1
    check(task, layers=6)
