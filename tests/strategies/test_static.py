"""Static strategies: the values they write, and what they refuse."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn

from lowrank_pl.allocation import LayerOverride
from lowrank_pl.core import axis_weighted_svd, truncated_svd
from lowrank_pl.errors.arguments import ExclusiveArgumentsError
from lowrank_pl.errors.numerics import BudgetError, NonFiniteError, RangeError, RankError, RatioError
from lowrank_pl.errors.optimizer import OptimizerCoverageError
from lowrank_pl.errors.parallelism import UnsupportedParallelismError
from lowrank_pl.errors.run import CalibrationError, ResumeMismatchError, StrategyPlacementError
from lowrank_pl.errors.targets import NoTargetError
from lowrank_pl.importance import empirical_fisher
from lowrank_pl.nn import LowRankLinear, dense_weight
from lowrank_pl.strategies import FWSVD, SVD, Calibration, CompressionStrategy, NoCompression
from lowrank_pl.surgery import TargetSelector
from lowrank_pl.tasks import SequenceClassification
from tests.support.runs import last_checkpoint, make_task, make_trainer
from tests.support.synthetic import SyntheticData


class Products(pl.Callback):
    """The dense weights that factorised layers compute with, when training starts."""

    def __init__(self) -> None:
        self.products: dict[str, torch.Tensor] = {}

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        modules = pl_module.encoder.named_modules()
        self.products = {n: m.product().detach().clone() for n, m in modules if isinstance(m, LowRankLinear)}


def products_in_fit(task: Any, folder: Path) -> dict[str, torch.Tensor]:
    callback = Products()
    make_trainer(folder, callbacks=[callback], limit_train_batches=1).fit(task, datamodule=SyntheticData())
    return callback.products


def dense_encoder(pretrained: str) -> Any:
    """The encoder as `make_task` builds it, before any strategy."""
    task = make_task(pretrained)
    task.build(SyntheticData().target)
    return task


def test_svd_writes_the_truncated_svd(tiny_bert: str, tmp_path: Path) -> None:
    weights = {n: dense_weight(m) for n, m in TargetSelector().select(dense_encoder(tiny_bert).encoder).items()}
    products = products_in_fit(make_task(tiny_bert, SVD(keep_ratio=0.5)), tmp_path)
    assert products.keys() == weights.keys()
    for name, product in products.items():
        rank = 8 if weights[name].shape == (32, 32) else 10
        torch.testing.assert_close(product, truncated_svd(weights[name].detach(), rank).product(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["input", "output", "both"])
def test_fwsvd_weighs_by_the_fisher_information_of_the_dense_model(tiny_bert: str, tmp_path: Path, side: Any) -> None:
    reference, data = dense_encoder(tiny_bert), SyntheticData()
    layers = TargetSelector().select(reference.encoder)
    fisher = empirical_fisher(reference.encoder, layers, data.calibration_batches(5), reference.per_sample_losses)
    products = products_in_fit(make_task(tiny_bert, FWSVD(side, keep_ratio=0.5)), tmp_path)
    for name, product in products.items():
        rank = 8 if dense_weight(layers[name]).shape == (32, 32) else 10
        sums = fisher.layers[name]
        expected = axis_weighted_svd(
            dense_weight(layers[name]).detach(),
            rank,
            sums.input_sums if side in ("input", "both") else None,
            sums.output_sums if side in ("output", "both") else None,
        )
        torch.testing.assert_close(product, expected.product(), atol=1e-4, rtol=0)


def test_calibration_moves_neither_the_random_state_nor_the_mode(tiny_bert: str, tmp_path: Path) -> None:
    class State(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            self.before = torch.get_rng_state()

        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            self.after = torch.get_rng_state()
            assert pl_module.encoder.training
            assert all(module.training for module in pl_module.encoder.modules())
            assert all(p.requires_grad and p.grad is None for p in pl_module.parameters())

    state = State()
    trainer = make_trainer(tmp_path, callbacks=[state], limit_train_batches=1)
    trainer.fit(make_task(tiny_bert, FWSVD("both", keep_ratio=0.5)), datamodule=SyntheticData())
    assert torch.equal(state.before, state.after)


def test_second_run_reads_the_cache(tiny_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Calibration(cache_dir=str(tmp_path / "fisher"))
    first = products_in_fit(make_task(tiny_bert, FWSVD("both", keep_ratio=0.5, calibration=options)), tmp_path)
    monkeypatch.setattr("lowrank_pl.importance.kinds.empirical_fisher", None)  # calling it would raise
    second = products_in_fit(make_task(tiny_bert, FWSVD("both", keep_ratio=0.5, calibration=options)), tmp_path)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = FWSVD("both", keep_ratio=0.5, calibration=Calibration(cache_dir=options.cache_dir, max_samples=9))
    with pytest.raises(TypeError, match="not callable"):
        products_in_fit(make_task(tiny_bert, other), tmp_path)


def test_zero_fisher_falls_back_to_svd_and_says_so(
    tiny_bert: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(tiny_bert, FWSVD("both", keep_ratio=0.5))
    monkeypatch.setattr(task, "per_sample_losses", lambda batch: task(batch).sum(1) * 0.0)
    with caplog.at_level(logging.WARNING):
        products = products_in_fit(task, tmp_path)
    assert "no loss depends on" in caplog.text
    assert len(task.compression.notes) == len(products)
    plain = products_in_fit(make_task(tiny_bert, SVD(keep_ratio=0.5)), tmp_path)
    for name, product in products.items():
        torch.testing.assert_close(product, plain[name], atol=1e-5, rtol=0)


def test_record_tells_ranks_costs_and_errors(tiny_bert: str, tmp_path: Path) -> None:
    overrides = [LayerOverride("*.layer.0.*.query", rank=3), LayerOverride("*.layer.1.*", dense=True)]
    task = make_task(tiny_bert, FWSVD("both", keep_ratio=0.4, overrides=overrides))
    products_in_fit(task, tmp_path)
    layers = {layer.name: layer for layer in task.compression.layers}
    query = layers["bert.encoder.layer.0.attention.self.query"]
    assert (query.rank, query.kind, query.parameters) == (3, "low_rank", 3 * 64)
    assert query.error is not None
    assert query.weighted_error is not None
    assert 0 < query.weighted_error < query.error < 1
    dense = layers["bert.encoder.layer.1.intermediate.dense"]
    assert (dense.rank, dense.kind, dense.parameters, dense.error) == (32, "dense", 2048, 0.0)
    assert task.compression.options["calibration_samples"] == 48
    assert task.compression.targeted_dense == 16384
    json.dumps(task.compression.to_dict())


def test_multiple_of_rounds_ranks(tiny_bert: str) -> None:
    task = dense_encoder(tiny_bert)
    ranks = SVD(keep_ratio=0.6, multiple_of=4).plan(task.encoder).ranks
    assert set(ranks.values()) == {8, 12}


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ({}, ExclusiveArgumentsError, "none of keep_ratio, rank_ratio is given"),
        ({"keep_ratio": 0.5, "rank_ratio": 0.5}, ExclusiveArgumentsError, "=null"),
        ({"keep_ratio": 0.0}, RatioError, "keep_ratio=0.0"),
        ({"keep_ratio": 1.5}, RatioError, "0 < keep_ratio <= 1"),
        ({"keep_ratio": float("nan")}, RatioError, "nan"),
        ({"rank_ratio": -0.1}, RatioError, "rank_ratio=-0.1"),
        ({"keep_ratio": 0.5, "multiple_of": 0}, RangeError, "multiple_of=0"),
    ],
)
def test_bad_shares_are_refused_at_once(arguments: dict[str, Any], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        SVD(**arguments)


@pytest.mark.parametrize(
    ("strategy", "error", "told"),
    [
        (SVD(keep_ratio=0.001), BudgetError, "keep_ratio of 0.054688"),
        (SVD(keep_ratio=0.5, overrides=[LayerOverride("*query", rank=99)]), RankError, "rank 99.*query.*= 32"),
        (SVD(keep_ratio=0.5, targets=TargetSelector(include=["*.atention.*"])), NoTargetError, "atention"),
    ],
    ids=["budget", "rank", "targets"],
)
def test_impossible_plans_are_refused_before_training(
    tiny_bert: str, tmp_path: Path, strategy: CompressionStrategy, error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        make_trainer(tmp_path).fit(make_task(tiny_bert, strategy), datamodule=SyntheticData())


def test_nan_weight_is_named(tiny_bert: str, tmp_path: Path) -> None:
    task = dense_encoder(tiny_bert)
    with torch.no_grad():
        task.encoder.get_parameter("bert.encoder.layer.1.output.dense.weight")[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"bert\.encoder\.layer\.1\.output\.dense"):
        SVD(keep_ratio=0.5).check(task.encoder)


def test_strategy_under_trainer_callbacks_is_refused(tiny_bert: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=[SVD(keep_ratio=0.5)])
    with pytest.raises(StrategyPlacementError, match=r"move it to model\.init_args\.strategy"):
        trainer.fit(make_task(tiny_bert), datamodule=SyntheticData())


def test_the_same_strategy_twice_is_refused_too(tiny_bert: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=[SVD(keep_ratio=0.9)])
    with pytest.raises(StrategyPlacementError):
        trainer.fit(make_task(tiny_bert, SVD(keep_ratio=0.5)), datamodule=SyntheticData())


@pytest.mark.parametrize("make", [lambda: Calibration(batch_size=0), lambda: Calibration(max_samples=0)])
def test_bad_calibration_is_refused_at_once(make: Any) -> None:
    with pytest.raises(RangeError, match=r"calibration\."):
        make()


@pytest.mark.parametrize("damping", [-1.0, float("nan")])
def test_bad_damping_is_refused_at_once(damping: float) -> None:
    with pytest.raises(RangeError, match="0 <= damping"):
        FWSVD(keep_ratio=0.5, damping=damping)


def test_sharding_is_refused(tiny_bert: str) -> None:
    task = make_task(tiny_bert, SVD(keep_ratio=0.5))

    class Sharded:
        strategy = object.__new__(FSDPStrategy)

    with pytest.raises(UnsupportedParallelismError, match=r"FSDPStrategy.*single device and DDP"):
        task.strategy.setup(Sharded(), task, "fit")


def test_importance_needs_a_datamodule(tiny_bert: str, tmp_path: Path) -> None:
    data = SyntheticData()
    task = make_task(tiny_bert, FWSVD(keep_ratio=0.5))
    task.build(data.target)
    with pytest.raises(CalibrationError, match="no datamodule was given"):
        make_trainer(tmp_path).fit(task, data.train_dataloader())


def test_optimizer_that_lacks_parameters_is_refused(tiny_bert: str, tmp_path: Path) -> None:
    task = make_task(tiny_bert, NoCompression(), optimizer=lambda groups: torch.optim.SGD(groups[1:], lr=0.1))
    with pytest.raises(OptimizerCoverageError, match="does not hold"):
        make_trainer(tmp_path).fit(task, datamodule=SyntheticData())


def test_resuming_with_other_ranks_is_refused(tiny_bert: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.fit(make_task(tiny_bert, SVD(keep_ratio=0.5)), datamodule=SyntheticData())
    other = make_task(tiny_bert, SVD(keep_ratio=0.3))
    with pytest.raises(ResumeMismatchError, match=r"keep_ratio=0\.5 there, keep_ratio=0\.3 here"):
        make_trainer(tmp_path, max_epochs=2).fit(other, datamodule=SyntheticData(), ckpt_path=last_checkpoint(trainer))


def test_resuming_with_another_method_is_refused(tiny_bert: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.fit(make_task(tiny_bert, SVD(keep_ratio=0.5)), datamodule=SyntheticData())
    other = make_task(tiny_bert, FWSVD(keep_ratio=0.5))
    with pytest.raises(ResumeMismatchError, match="not written by a run with strategy FWSVD"):
        make_trainer(tmp_path, max_epochs=2).fit(other, datamodule=SyntheticData(), ckpt_path=last_checkpoint(trainer))


def test_input_that_never_varies(tiny_bert: str, tmp_path: Path) -> None:
    """A constant input feature has exactly no influence through the keys: rounding must not make it negative."""
    task = make_task(tiny_bert, FWSVD("input", keep_ratio=0.5))
    task.build(SyntheticData().target)
    with torch.no_grad():
        for name, parameter in task.encoder.named_parameters():
            if "LayerNorm.weight" in name:
                parameter[:8] = 0
    assert len(products_in_fit(task, tmp_path)) == 12


def test_cache_tells_losses_apart(tiny_bert: str, tmp_path: Path) -> None:
    class Doubled(SequenceClassification):
        def losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return (logits**2).sum(1)

    first, second = (
        cls(tiny_bert, strategy=FWSVD("both", keep_ratio=0.5)) for cls in (SequenceClassification, Doubled)
    )
    for task in (first, second):
        pl.seed_everything(0, verbose=False)
        products_in_fit(task, tmp_path)
    assert first.compression is not None
    assert second.compression is not None
    assert first.compression.layers[0].weighted_error != second.compression.layers[0].weighted_error


def test_factorised_model_is_not_factorised_again(tiny_bert: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.fit(make_task(tiny_bert, SVD(keep_ratio=0.5)), datamodule=SyntheticData())
    again = make_task(None, SVD(keep_ratio=0.3), init_from=last_checkpoint(trainer))
    with pytest.raises(NoTargetError, match="12 layers are factorised already"):
        make_trainer(tmp_path).fit(again, datamodule=SyntheticData())


def test_compressed_model_tunes_on_without_a_strategy(tiny_bert: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.fit(make_task(tiny_bert, SVD(keep_ratio=0.5)), datamodule=SyntheticData())
    task = make_task(None, init_from=last_checkpoint(trainer))
    make_trainer(tmp_path).fit(task, datamodule=SyntheticData())
    assert sum(isinstance(m, LowRankLinear) for m in task.encoder.modules()) == 12
    assert task.compression.method == "SVD"


def test_fresh_head_is_told(tiny_bert: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    products_in_fit(make_task(tiny_bert, FWSVD(keep_ratio=0.5)), tmp_path)
    assert "the head is freshly initialised" in caplog.text


def test_no_reference_to_the_module_is_kept(tiny_bert: str, tmp_path: Path) -> None:
    task = make_task(tiny_bert, FWSVD("both", keep_ratio=0.5))
    products_in_fit(task, tmp_path)
    held = [value for value in vars(task.strategy).values() if isinstance(value, nn.Module)]
    assert held == []


def test_both_sides_count_by_default() -> None:
    assert FWSVD(keep_ratio=0.5).options()["side"] == "both"


def test_a_side_that_does_not_exist_is_refused() -> None:
    with pytest.raises(RangeError, match=r"side.*'inputs'"):
        FWSVD(side="inputs", keep_ratio=0.5)  # type: ignore[arg-type]
