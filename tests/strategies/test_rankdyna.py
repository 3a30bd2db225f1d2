"""Reallocation during training: the budget, when it happens, what it survives, what it refuses."""

from __future__ import annotations

import itertools
import json
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lowrank_pl.allocation import CubicSchedule, Latency, RankBounds
from lowrank_pl.errors import LowRankError
from lowrank_pl.errors.arguments import ExclusiveArgumentsError
from lowrank_pl.errors.budget import BudgetAboveStartError, BudgetNotReachedError, ScheduleError
from lowrank_pl.errors.numerics import BudgetError, BudgetUnitError, NonFiniteError, RangeError, RatioError
from lowrank_pl.errors.run import FrozenFactorsError, ResumeMismatchError
from lowrank_pl.errors.targets import OverrideError
from lowrank_pl.importance import FirstOrder, Groups, GroupSensitivity, KroneckerSensitivity, Squared
from lowrank_pl.monitoring import RankHistory, ReportWriter
from lowrank_pl.nn import ElasticLinear, LowRankLinear, forms_in_training
from lowrank_pl.strategies import RankDyna
from lowrank_pl.strategies.rewarming import Rewarming
from lowrank_pl.surgery import TargetSelector, read_layout, svd_layers
from lowrank_pl.tasks import SequenceClassification
from tests.support import rankdyna_processes
from tests.support.forks import Forks
from tests.support.runs import last_checkpoint, make_task, make_trainer
from tests.support.synthetic import SyntheticData

DENSE = 16384  # 2 blocks of four 32x32 and two 64x32 weights

either = pytest.mark.parametrize("score", [KroneckerSensitivity, FirstOrder])


def fit(pretrained: str, folder: Path, strategy: RankDyna, **arguments: Any) -> tuple[Any, Any]:
    task = make_task(pretrained, strategy)
    trainer = make_trainer(folder, **{"max_epochs": 2, **arguments})
    trainer.fit(task, datamodule=SyntheticData())
    return task, trainer


@either
def test_ends_at_the_budget_with_exact_ranks(tiny_bert: str, tmp_path: Path, score: Any) -> None:
    task, _ = fit(tiny_bert, tmp_path, RankDyna(keep_ratio=0.4, sensitivity=score(), allow_dense=False))
    layers = {n: m for n, m in task.encoder.named_modules() if isinstance(m, LowRankLinear)}
    kept = sum(m.left.weight.numel() + m.right.weight.numel() for m in layers.values())
    assert len(layers) == 12
    assert not forms_in_training(task.encoder)
    assert 0.4 * DENSE - 96 < kept <= 0.4 * DENSE
    assert {layer.name: layer.rank for layer in task.compression.layers} == {n: m.rank for n, m in layers.items()}
    assert len({m.rank for m in layers.values()}) > 1  # not the uniform share


def test_every_way_to_say_the_budget_gives_the_same(tiny_bert: str, tmp_path: Path) -> None:
    first, _ = fit(tiny_bert, tmp_path, RankDyna(keep_ratio=0.5))
    untargeted = sum(p.numel() for p in first.encoder.parameters()) - first.compression.targeted_kept
    for strategy in (RankDyna(parameters=DENSE // 2), RankDyna(model_parameters=untargeted + DENSE // 2)):
        other, _ = fit(tiny_bert, tmp_path, strategy)
        assert read_layout(other.encoder) == read_layout(first.encoder)


@either
def test_ranks_only_fall_and_follow_the_schedule(tiny_bert: str, tmp_path: Path, score: Any) -> None:
    schedule = CubicSchedule(warmup=0.1, cooldown=0.25, interval=0.1)
    task, _ = fit(tiny_bert, tmp_path, RankDyna(keep_ratio=0.3, schedule=schedule, sensitivity=score()), max_epochs=4)
    history = task.strategy.state.history
    assert [entry.step for entry in history] == [4, 6, 8, 10, 12, 14, 16, 18]  # of 24: from 2 on, every 2, until 18
    assert all(entry.kept <= entry.scheduled for entry in history)
    for before, after in itertools.pairwise(history):
        assert all(after.ranks[name] <= rank for name, rank in before.ranks.items())
    assert history[-1].scheduled == math.floor(0.3 * DENSE)


def test_dropped_groups_are_zero_and_stay_zero(tiny_bert: str, tmp_path: Path) -> None:
    seen = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
            for layer in svd_layers(pl_module.encoder).values():
                seen.append(layer.capacity - layer.rank)
                for tensor in (layer.left.T, layer.sigma, layer.right):
                    assert not tensor[layer.rank :].any()
                for state in trainer.optimizers[0].state.values():
                    assert all(torch.isfinite(v).all() for v in state.values())

    fit(tiny_bert, tmp_path, RankDyna(keep_ratio=0.3, sensitivity=FirstOrder()), callbacks=[Look()])
    assert max(seen) > 10


def test_layers_are_dense_first_and_nothing_stands_behind_their_factors_later(tiny_bert: str, tmp_path: Path) -> None:
    forms: list[set[bool]] = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
            layers = forms_in_training(pl_module.encoder).values()
            forms.append({layer.is_dense for layer in layers if isinstance(layer, ElasticLinear)})
            for layer in layers:
                assert isinstance(layer, ElasticLinear)
                if layer.is_dense:
                    continue
                used = layer.shape.factored_params(layer.rank)
                states = trainer.optimizers[0].state[layer.storage].values()
                for tensor in (layer.storage, *(state for state in states if state.shape == layer.storage.shape)):
                    assert torch.isfinite(tensor).all()
                    assert tensor.detach().reshape(-1)[:used].any()
                    assert not tensor.detach().reshape(-1)[used:].any()

    fit(tiny_bert, tmp_path, RankDyna(keep_ratio=0.3), callbacks=[Look()])
    assert forms[0] == forms[3] == {True}
    assert forms[-1] == {False}


def test_only_the_steps_before_a_reallocation_are_observed(tiny_bert: str, tmp_path: Path) -> None:
    seen: list[int] = []

    class Look(pl.Callback):
        def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: Any) -> None:
            layers = forms_in_training(pl_module.encoder).values()
            if all(layer.observer is not None for layer in layers if isinstance(layer, ElasticLinear)):
                seen.append(trainer.global_step + 1)

    schedule = CubicSchedule(warmup=0.25, cooldown=0.25, interval=0.25)
    strategy = RankDyna(keep_ratio=0.3, schedule=schedule, sensitivity=KroneckerSensitivity(steps=2))
    fit(tiny_bert, tmp_path, strategy, callbacks=[Look()], max_epochs=4)
    assert [entry.step for entry in strategy.state.history] == [12, 18]
    assert seen == [11, 12, 17, 18]
    assert strategy.sensitivity.steps == 4


def test_energies_are_those_of_the_weights_that_are_decomposed(tiny_bert: str, tmp_path: Path) -> None:
    """What the loss loses by dropping groups, the sum of their energies, is the squared error in the metric."""
    products: dict[str, torch.Tensor] = {}
    moments: dict[str, list[torch.Tensor]] = {}
    ratios: dict[str, float] = {}

    def damped(moment: torch.Tensor) -> torch.Tensor:
        moment = moment.double()
        return moment + 1e-3 * moment.diagonal().mean() * torch.eye(len(moment))

    class Look(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
            for name, layer in forms_in_training(pl_module.encoder).items():
                products[name] = layer.product().detach().clone()
                moments[name] = pl_module.strategy.sensitivity.moments(name, layer.shape, torch.device("cpu"))

        def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            for name, layer in forms_in_training(pl_module.encoder).items():
                inputs, outputs, tokens = moments[name]
                rest = products[name].double() - layer.product().detach().double()
                lost = torch.trace(damped(outputs) @ rest @ damped(inputs / tokens) @ rest.T)
                dropped = pl_module.strategy.latest_scores[name][layer.rank :].sum()
                ratios[name] = float(lost / dropped)

    strategy = RankDyna(keep_ratio=0.3, schedule=CubicSchedule(0.1, 0.0, 1.0))  # once, after the last step
    task = make_task(tiny_bert, strategy, optimizer=lambda params: torch.optim.SGD(params, lr=1e-6))
    make_trainer(tmp_path, callbacks=[Look()]).fit(task, datamodule=SyntheticData())
    assert len(ratios) == 12
    assert list(ratios.values()) == pytest.approx([1.0] * 12, rel=1e-3)


def test_every_sample_counts_as_much_in_whatever_batch_it_is(tiny_bert: str, tmp_path: Path) -> None:
    """48 samples in batches of 8, and of 5 with a last one of 3; weights do not change, and nothing fades."""

    class Look(pl.Callback):
        def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            for module in pl_module.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0

        def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
            for name, layer in forms_in_training(pl_module.encoder).items():
                moments[name] = pl_module.strategy.sensitivity.moments(name, layer.shape, torch.device("cpu"))

    found = []
    for batch_size in (8, 5):
        moments: dict[str, list[torch.Tensor]] = {}
        strategy = RankDyna(0.5, schedule=CubicSchedule(0.0, 0.0, 1.0), sensitivity=KroneckerSensitivity(beta=1.0))
        task = make_task(tiny_bert, strategy, optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
        make_trainer(tmp_path, callbacks=[Look()]).fit(task, datamodule=SyntheticData(batch_size=batch_size))
        found.append(moments)
    for name, wide in found[0].items():
        for one, other in zip(wide, found[1][name], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(one.abs().max()), msg=name)


def test_the_best_checkpoint_is_one_at_the_budget(tiny_bert: str, tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, "best", monitor="val/score_at_budget", mode="max")
    scores = []

    class Scores(pl.Callback):
        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            scores.append(float(trainer.callback_metrics["val/score_at_budget"]))

    fit(tiny_bert, tmp_path, RankDyna(keep_ratio=0.4), callbacks=[best, Scores()], max_epochs=4)
    assert scores[0] < -1
    assert best.best_model_score == max(scores[2:]) >= 0
    loaded = SequenceClassification.load_from_checkpoint(best.best_model_path, weights_only=True)
    assert loaded.compression is not None
    assert loaded.compression.keep_ratio <= 0.4


@either
@pytest.mark.parametrize("step", [2, 5])
def test_a_checkpoint_on_the_way_loads_and_trains_on_without_the_strategy(
    tiny_bert: str, tmp_path: Path, score: Any, step: int
) -> None:
    every = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=step, save_top_k=-1)
    fit(tiny_bert, tmp_path, RankDyna(keep_ratio=0.4, sensitivity=score()), callbacks=[every])
    path = str(tmp_path / f"step={step}.ckpt")
    assert any(key.endswith(".active") for key in torch.load(path, weights_only=True)["state_dict"])
    task = make_task(None, init_from=path)
    trainer = make_trainer(tmp_path)
    trainer.fit(task, datamodule=SyntheticData())
    dense_still = score is KroneckerSensitivity and step == 2
    assert any(isinstance(m, LowRankLinear) for m in task.encoder.modules()) != dense_still
    assert not forms_in_training(task.encoder)
    assert task.compression.notes == ("the budget of 6,553 parameters has not been reached",)


@either
def test_accumulation_observes_and_reallocates_once_per_step(tiny_bert: str, tmp_path: Path, score: Any) -> None:
    strategy = RankDyna(keep_ratio=0.4, schedule=CubicSchedule(0.0, 0.2, 0.1), sensitivity=score())
    task, trainer = fit(tiny_bert, tmp_path, strategy, accumulate_grad_batches=2, max_epochs=4)
    steps = [entry.step for entry in task.strategy.state.history]
    assert trainer.global_step == 12
    assert steps == list(range(1, 11))
    assert strategy.sensitivity.steps == 10  # none after the budget was reached


def test_clipping_does_not_change_scores(tiny_bert: str, tmp_path: Path) -> None:
    def first_groups(**arguments: Any) -> Groups:
        seen: list[Groups] = []

        class Spy(Squared):
            def update(self, name: str, groups: Groups) -> None:
                seen.append(Groups(*(tensor.clone() for tensor in vars(groups).values())))
                super().update(name, groups)

        fit(tiny_bert, tmp_path, RankDyna(keep_ratio=0.5, sensitivity=Spy()), limit_train_batches=4, **arguments)
        return seen[0]

    free, clipped = first_groups(), first_groups(gradient_clip_val=1e-9)
    assert float(free.sigma_grad.abs().max()) > 1e-7
    assert torch.equal(free.sigma_grad, clipped.sigma_grad)


class Poison(pl.Callback):
    """Makes one gradient NaN at some steps."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_after_backward(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.global_step in self.steps:
            next(iter(svd_layers(pl_module.encoder).values())).sigma.grad.fill_(math.nan)  # type: ignore[union-attr]


class PoisonedLoss(pl.Callback):
    """Makes the gradients of all outputs NaN at some steps."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: torch.Tensor) -> None:
        if trainer.global_step in self.steps:
            loss.register_hook(lambda gradient: gradient * math.nan)


class Skip(torch.optim.AdamW):
    """Takes zeros for gradients that are NaN, so that weights stay finite as they do in mixed precision."""

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.nan_to_num_(0.0)
        super().step()
        return loss


@pytest.mark.parametrize(("score", "poison"), [(FirstOrder, Poison), (KroneckerSensitivity, PoisonedLoss)])
def test_steps_with_nan_gradients_do_not_count(
    tiny_bert: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, score: Any, poison: Any
) -> None:
    strategy = RankDyna(keep_ratio=0.4, sensitivity=score())
    task = make_task(tiny_bert, strategy, optimizer=lambda params: Skip(params, lr=1e-2))
    trainer = make_trainer(tmp_path, max_epochs=2, callbacks=[poison(1, 3)])
    with caplog.at_level(logging.WARNING):
        trainer.fit(task, datamodule=SyntheticData())
    assert task.strategy.state.skipped == 2
    assert caplog.text.count("is not finite") == 1
    assert all(torch.isfinite(score).all() for score in task.strategy.latest_scores.values())
    assert task.compression.notes == ("2 optimizer steps with gradients that are not finite were left out",)


@either
def test_ranks_are_not_chosen_by_nothing(tiny_bert: str, tmp_path: Path, score: Any) -> None:
    """Where not one gradient was finite, the first reallocations do not happen, and the last one fails."""
    task = make_task(tiny_bert, RankDyna(0.4, sensitivity=score()), optimizer=lambda params: Skip(params, lr=1e-2))
    with pytest.raises(NonFiniteError, match="every gradient so far"):
        make_trainer(tmp_path, callbacks=[PoisonedLoss(*range(6))]).fit(task, datamodule=SyntheticData())
    assert not task.strategy.state.history


@either
def test_layers_on_which_no_loss_depends_are_told(
    tiny_bert: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, score: Any
) -> None:
    """Here the model takes the weight of a block's last layer away from the graph."""

    class Severed(SequenceClassification):
        def forward(self, batch: Any) -> Any:
            layer: Any = self.encoder.get_submodule("bert.encoder.layer.1.output.dense")
            handle = layer.register_forward_hook(lambda module, args, output: output.detach())
            try:
                return super().forward(batch)
            finally:
                handle.remove()

    pl.seed_everything(0, verbose=False)
    task = Severed(tiny_bert, strategy=RankDyna(0.4, sensitivity=score()))
    make_trainer(tmp_path, max_epochs=2).fit(task, datamodule=SyntheticData())
    told = "no loss depends on 2 layers, e.g. 'bert.encoder.layer.1.intermediate.dense'"
    assert task.compression is not None
    assert task.compression.notes == (f"{told}: they got the lowest ranks that there are",)
    assert caplog.text.count("no loss depends on 2 targeted layers") == 1


def test_bounds_multiples_and_dense_layers(tiny_bert: str, tmp_path: Path) -> None:
    strategy = RankDyna(
        keep_ratio=0.6,
        bounds=[RankBounds("*.layer.0.*query", low=7, high=9), RankBounds("*intermediate*", high=4)],
        multiple_of=4,
        allow_dense=True,
    )
    task, _ = fit(tiny_bert, tmp_path, strategy)
    records = {layer.name.removeprefix("bert.encoder.layer."): layer for layer in task.compression.layers}
    assert 7 <= records.pop("0.attention.self.query").rank <= 9
    assert records["1.intermediate.dense"].rank <= 4
    assert all(layer.rank % 4 == 0 for layer in records.values() if layer.kind == "low_rank" and layer.rank > 4)
    for name, layer in records.items():
        module = task.encoder.get_submodule(f"bert.encoder.layer.{name}")
        assert isinstance(module, nn.Linear if layer.kind == "dense" else LowRankLinear)
    assert task.compression.keep_ratio <= 0.6


@pytest.mark.parametrize("sensitivity", [None, FirstOrder()], ids=["kronecker", "scores"])
def test_multiples_leave_less_of_the_budget_than_one_of_them_costs(
    tiny_bert: str, tmp_path: Path, sensitivity: GroupSensitivity | None
) -> None:
    strategy = RankDyna(keep_ratio=0.5, multiple_of=4, sensitivity=sensitivity)
    task, _ = fit(tiny_bert, tmp_path, strategy)
    record = task.compression
    assert all(layer.rank % 4 == 0 or layer.rank < 4 for layer in record.layers if layer.kind == "low_rank")
    left = 0.5 * record.targeted_dense - record.targeted_kept
    dearest = max(4 * (layer.out_features + layer.in_features) for layer in record.layers)
    assert 0 <= left < dearest


def test_it_says_beforehand_what_it_will_do_and_take(tiny_bert: str) -> None:
    task = make_task(tiny_bert, RankDyna(keep_ratio=0.5, schedule=CubicSchedule(0.3, 0.5, 0.05)))
    task.build()
    told = task.strategy.told_beforehand(task.encoder, 4, None)
    layers = task.strategy.targets.select(task.encoder)
    dense = sum(layer.get_parameter("weight").numel() for layer in layers.values())
    assert told[0] == f"RankDyna: the budget is {dense // 2:,} of {dense:,} parameters of 12 layers (keep_ratio 0.5000)"
    assert told[1] == "ranks are reallocated after steps 350, 400, 450, 500 of 1,000; the last one reaches the budget"
    assert re.fullmatch(
        r"until then, what is observed takes up to 0\.\d MiB, and a reallocation 0\.\d MiB more", told[2]
    )


def test_starting_below_full_rank(tiny_bert: str, tmp_path: Path) -> None:
    task, _ = fit(tiny_bert, tmp_path, RankDyna(keep_ratio=0.3, start_ratio=0.5, sensitivity=FirstOrder()))
    assert set(task.strategy.state.capacities.values()) == {16}


def test_starts_from_a_task_tuned_model(tiny_bert: str, tmp_path: Path) -> None:
    dense = make_task(tiny_bert)
    trainer = make_trainer(tmp_path)
    trainer.fit(dense, datamodule=SyntheticData())
    task = make_task(None, RankDyna(keep_ratio=0.4), init_from=last_checkpoint(trainer))
    make_trainer(tmp_path, max_epochs=2).fit(task, datamodule=SyntheticData())
    assert task.compression.keep_ratio <= 0.4


@pytest.mark.parametrize("arguments", [{"max_steps": 7, "max_epochs": -1}, {"max_epochs": 1, "limit_train_batches": 1}])
def test_any_length_of_run(tiny_bert: str, tmp_path: Path, arguments: dict[str, Any]) -> None:
    task, _ = fit(tiny_bert, tmp_path, RankDyna(keep_ratio=0.4), **arguments)
    assert task.strategy.at_budget


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: RankDyna(), ExclusiveArgumentsError, "none of keep_ratio"),
        (lambda: RankDyna(0.5, 100), ExclusiveArgumentsError, "keep_ratio and parameters"),
        (lambda: RankDyna(1.5), RatioError, "keep_ratio=1.5"),
        (lambda: RankDyna(0.5, start_ratio=0.0), RangeError, "start_ratio"),
        (lambda: RankDyna(0.5, multiple_of=0), RangeError, "multiple_of"),
        (lambda: RankDyna(0.5, schedule=CubicSchedule(0.6, 0.5)), ScheduleError, "warmup"),
        (lambda: RankDyna(0.01), BudgetError, "already costs 896 of 16,384"),
        (lambda: RankDyna(model_parameters=100), BudgetError, "more parameters of the model are not targeted"),
        (
            lambda: RankDyna(0.5, start_ratio=0.9),
            RangeError,
            "start_ratio=0.9 .* with Kronecker",
        ),
        (lambda: RankDyna(0.5, per_parameter=False), RangeError, "per_parameter=False"),
        (lambda: RankDyna(0.5, floor=1.5), RangeError, "floor=1.5"),
        (lambda: RankDyna(0.5, sensitivity=object()), RangeError, "sensitivity='object' .* GroupSensitivity"),  # type: ignore[arg-type]
        (
            lambda: RankDyna(0.9, start_ratio=0.1, sensitivity=FirstOrder(), allow_dense=False),
            BudgetAboveStartError,
            "start_ratio=0.1",
        ),
        (lambda: RankDyna(0.5, bounds=[RankBounds("*.layer.9.*")]), OverrideError, "matches no targeted layer"),
        (
            lambda: RankDyna(0.5, bounds=[RankBounds(low=30)]),
            BudgetError,
            r"lowest ranks in bounds, e\.g\. rank 30 in 'bert",
        ),
        (
            lambda: RankDyna(0.5, bounds=[RankBounds(low=9)], start_ratio=0.25, sensitivity=FirstOrder()),
            RangeError,
            r"low=9 .* at most 8, with",
        ),
        (
            lambda: RankDyna(0.5, bounds=[RankBounds("*query", low=20)], allow_dense=False),
            RangeError,
            r"low=20 .* at most 16, .*allow_dense",
        ),
        (
            lambda: RankDyna(0.5, bounds=[RankBounds("*query", low=20, high=24)]),
            RangeError,
            r"low=20 .* at most 16, .* or a high of 32 or null",
        ),
        (lambda: RankDyna(parameters=16_385), RangeError, "at most 16,384, what the targeted weights have when dense"),
    ],
)
def test_impossible_requests_are_refused_before_training(
    tiny_bert: str, tmp_path: Path, make: Callable[[], RankDyna], error: type[LowRankError], message: str
) -> None:
    with pytest.raises(error, match=message):
        fit(tiny_bert, tmp_path, make())
    assert not list(tmp_path.rglob("*.ckpt"))


def test_frozen_layers_are_refused(tiny_bert: str, tmp_path: Path) -> None:
    class Frozen(SequenceClassification):
        def configure_model(self) -> None:
            super().configure_model()
            self.encoder.base_model.requires_grad_(False)

    with pytest.raises(FrozenFactorsError, match="12 targeted layers"):
        make_trainer(tmp_path).fit(Frozen(tiny_bert, strategy=RankDyna(0.5)), datamodule=SyntheticData())


def test_a_run_that_ends_too_early_says_so(tiny_bert: str, tmp_path: Path) -> None:
    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.should_stop = True

    task = make_task(tiny_bert, RankDyna(keep_ratio=0.4))
    trainer = make_trainer(tmp_path, max_epochs=4, callbacks=[Stop(), ReportWriter(), RankHistory()])
    with pytest.raises(BudgetNotReachedError, match="after 6 of 24 optimizer steps"):
        trainer.fit(task, datamodule=SyntheticData())
    report = json.loads((Path(str(trainer.log_dir)) / "report.json").read_text(encoding="utf-8"))
    assert report["notes"] == ["the budget of 6,553 parameters has not been reached"]
    assert report["keep_ratio"] > 0.4
    assert Path(last_checkpoint(trainer)).exists()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: RankDyna(keep_ratio=0.3), "a budget of 6,553 there, of 4,915 here"),
        (
            lambda: RankDyna(keep_ratio=0.4, start_ratio=0.9, sensitivity=FirstOrder()),
            "differ from what the strategy prepared",
        ),
        (
            lambda: RankDyna(keep_ratio=0.4, sensitivity=FirstOrder()),
            "differ from what the strategy prepared",
        ),
        (lambda: RankDyna(keep_ratio=0.6, targets=TargetSelector(exclude=["*query"])), "layers, e.g. "),
    ],
)
def test_resuming_with_another_budget_or_other_layers_is_refused(
    tiny_bert: str, tmp_path: Path, other: Callable[[], RankDyna], message: str
) -> None:
    _, trainer = fit(tiny_bert, tmp_path, RankDyna(keep_ratio=0.4))
    task = make_task(tiny_bert, other())
    with pytest.raises(ResumeMismatchError, match=message):
        make_trainer(tmp_path, max_epochs=3).fit(task, datamodule=SyntheticData(), ckpt_path=last_checkpoint(trainer))


def test_resuming_a_dense_run_is_refused(tiny_bert: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.fit(make_task(tiny_bert), datamodule=SyntheticData())
    task = make_task(tiny_bert, RankDyna(keep_ratio=0.4))
    with pytest.raises(ResumeMismatchError):
        make_trainer(tmp_path, max_epochs=3).fit(task, datamodule=SyntheticData(), ckpt_path=last_checkpoint(trainer))


def test_resuming_a_finished_run_changes_nothing(tiny_bert: str, tmp_path: Path) -> None:
    done, trainer = fit(tiny_bert, tmp_path, RankDyna(keep_ratio=0.4))
    task = make_task(tiny_bert, RankDyna(keep_ratio=0.4))
    make_trainer(tmp_path, max_epochs=2).fit(task, datamodule=SyntheticData(), ckpt_path=last_checkpoint(trainer))
    assert task.strategy.at_budget
    assert read_layout(task.encoder) == read_layout(done.encoder)


@either
def test_two_processes_agree_with_each_other_and_with_one(
    everything_loaded: Forks, tiny_bert: str, tmp_path: Path, score: Any
) -> None:
    rankdyna_processes.run(tmp_path, tiny_bert, 1, score.__name__)
    words = [str(rankdyna_processes.__file__), str(tmp_path), tiny_bert, "2", score.__name__]
    everything_loaded.run(words, tmp_path, processes=2)
    names = ("devices-1-rank-0", "devices-2-rank-0", "devices-2-rank-1")
    one, first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in names)
    assert len(one) == len(first) == 13
    assert len({tuple(step["ranks"].values()) for step in first}) > 5
    for alone, a, b in zip(one, first, second, strict=True):
        assert a["ranks"] == b["ranks"] == alone["ranks"]
        assert all(torch.equal(a["state"][key], b["state"][key]) for key in a["state"])
        rtol, atol = (1e-5, 1e-6) if score is FirstOrder else (1e-2, 1e-3)
        for key, tensor in alone["products"].items():
            torch.testing.assert_close(a["products"][key], tensor, rtol=rtol, atol=atol)


@either
def test_two_processes_resume_with_what_both_have_observed(
    everything_loaded: Forks, tiny_bert: str, tmp_path: Path, score: Any
) -> None:
    words = [str(rankdyna_processes.__file__), str(tmp_path), tiny_bert, "2", score.__name__, "resumed"]
    everything_loaded.run(words, tmp_path, processes=2)
    for rank in (0, 1):
        whole, resumed = (
            torch.load(tmp_path / f"{name}-2-rank-{rank}.pt", weights_only=True) for name in ("devices", "resumed")
        )
        assert len(whole) == 13
        assert len(resumed) == 7
        for one, other in zip(whole[6:], resumed, strict=True):
            assert one["ranks"] == other["ranks"]
            assert all(torch.equal(tensor, other["state"][key]) for key, tensor in one["state"].items())


def test_a_budget_in_measured_time(tiny_bert: str, tmp_path: Path) -> None:
    """Where up and down projections are slow at any rank, time is saved elsewhere."""
    shapes = [
        {"out": m, "in": n, "dense_nanoseconds": 100, "ranks": [1, 32], "nanoseconds": times}
        for (m, n), times in {(32, 32): [10, 200], (64, 32): [90, 95], (32, 64): [90, 95]}.items()
    ]
    table = tmp_path / "latency.json"
    table.write_text(json.dumps({"version": 1, "shapes": shapes}), encoding="utf-8")
    strategy = RankDyna(keep_ratio=0.75, cost=Latency(str(table)), sensitivity=FirstOrder(), allow_dense=False)
    task = make_task(tiny_bert, strategy)
    make_trainer(tmp_path, max_epochs=2).fit(task, datamodule=SyntheticData())
    assert task.compression is not None
    budget = int(0.75 * 100 * len(task.compression.layers))
    assert strategy.state.budget == budget
    assert strategy.state.reached
    spent = strategy.frame.kept({layer.name: layer.rank for layer in task.compression.layers})
    assert 0.9 * budget < spent <= budget
    wide = [layer.rank for layer in task.compression.layers if layer.out_features != layer.in_features]
    square = [layer.rank for layer in task.compression.layers if layer.out_features == layer.in_features]
    assert min(wide) > max(square)
    assert strategy.options()["cost"]["table"] == str(table)


def test_a_number_of_parameters_is_no_budget_in_time(tiny_bert: str, tmp_path: Path) -> None:
    table = tmp_path / "latency.json"
    entry = {"dense_nanoseconds": 100, "ranks": [1], "nanoseconds": [10]}
    shapes = [{"out": m, "in": n, **entry} for m, n in [(32, 32), (64, 32), (32, 64)]]
    table.write_text(json.dumps({"version": 1, "shapes": shapes}), encoding="utf-8")
    task = make_task(tiny_bert, RankDyna(parameters=5000, cost=Latency(str(table))))
    with pytest.raises(BudgetUnitError):
        make_trainer(tmp_path, max_epochs=1).fit(task, datamodule=SyntheticData())


class WatchedAdamW(torch.optim.AdamW):
    """Notes the learning rate that every step is done with; both its own `step` and the inherited one call hooks."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        self.rates: list[float] = []

    def step(self, closure: Any = None) -> Any:
        def noting() -> Any:
            loss = closure()
            self.rates.append(self.param_groups[0]["lr"])
            return loss

        return super().step(noting)


@either
def test_learning_rates_rise_anew_after_reallocations(tiny_bert: str, tmp_path: Path, score: Any) -> None:
    def rates(rewarmup: float) -> tuple[list[float], list[int], Any]:
        schedule = CubicSchedule(warmup=0.2, cooldown=0.4, interval=0.2, rewarmup=rewarmup)
        strategy = RankDyna(keep_ratio=0.4, schedule=schedule, sensitivity=score())
        made: list[WatchedAdamW] = []

        def optimizer(params: Any) -> torch.optim.Optimizer:
            made.append(WatchedAdamW(params, lr=1e-3))
            return made[0]

        task = make_task(tiny_bert, strategy, optimizer=optimizer)
        trainer = make_trainer(tmp_path / str(rewarmup), max_epochs=3, limit_train_batches=5)
        trainer.fit(task, datamodule=SyntheticData())
        assert not made[0]._optimizer_step_pre_hooks
        assert not made[0]._optimizer_step_post_hooks
        return made[0].rates, [entry.step for entry in strategy.state.history], trainer

    plain, steps, _ = rates(0.0)
    anew, same_steps, trainer = rates(0.15)  # two of fifteen steps
    assert steps == same_steps == [6, 9]
    # The second and third parts: of three, of two thirds; steps are counted from 0 here.
    factors = [found / given if given else 1.0 for found, given in zip(anew, plain, strict=True)]
    expected = [1.0] * 15
    for step in steps:
        expected[step : step + 2] = [1 / 3, 2 / 3]
    assert factors == pytest.approx(expected)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)  # where the scheduler has it


def test_an_error_within_a_step_leaves_the_learning_rate_as_the_scheduler_has_it() -> None:
    (parameter,) = [nn.Parameter(torch.ones(1))]
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    rewarming = Rewarming([optimizer], lambda: 0.1)

    def closure() -> Any:
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    rewarming.close()
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert CubicSchedule(rewarmup=0.001).over(100).rewarmup == 1


def test_a_rise_beyond_the_run_is_refused() -> None:
    with pytest.raises(RangeError, match=r"schedule\.rewarmup"):
        CubicSchedule(rewarmup=1.5)
