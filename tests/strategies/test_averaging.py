"""Weight averaging: the averaged copies follow whatever happens to the layers of the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from torch import Tensor

from lowrank_pl.allocation import CubicSchedule
from lowrank_pl.importance import FirstOrder, KroneckerSensitivity
from lowrank_pl.nn import forms_in, forms_in_training
from lowrank_pl.strategies import FWSVD, SVD, CompressionStrategy, NoCompression, RankDyna
from lowrank_pl.strategies.averaging import averaged_models
from lowrank_pl.surgery import read_layout
from lowrank_pl.tasks import SequenceClassification
from tests.support.runs import make_task, make_trainer
from tests.support.synthetic import SyntheticData

# SVD does a part of what FWSVD does before training, and the same from then on.
STATIC: dict[str, Callable[[], CompressionStrategy]] = {
    "none": NoCompression,
    "fwsvd": lambda: FWSVD("both", keep_ratio=0.5),
}
AVERAGING: dict[str, Callable[[], pl.Callback]] = {
    "ema": lambda: EMAWeightAveraging(decay=0.9),
    "swa_of_weights": WeightAveraging,
    "swa": lambda: StochasticWeightAveraging(0.01, swa_epoch_start=1, annealing_epochs=1),
}


SCORES = pytest.mark.parametrize("score", [KroneckerSensitivity, FirstOrder])


def rankdyna(score: Any) -> RankDyna:
    return RankDyna(keep_ratio=0.4, schedule=CubicSchedule(0.0, 0.2, 0.1), sensitivity=score())


def products(model: Any) -> dict[str, Tensor]:
    return {name: layer.product().detach().clone() for name, layer in forms_in(model.encoder).items()}


class StillWeights(pl.Callback):
    """Keeps weights where they are, so that an average of them is the weights, whatever groups are reordered to."""

    def __init__(self) -> None:
        self.differences: list[float] = []
        self.layers = 0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = 0.0
        own = forms_in_training(pl_module.encoder)
        for model in averaged_models(trainer):
            for name, layer in forms_in_training(getattr(model, "encoder")).items():  # noqa: B009
                active = layer.get_buffer("active")
                assert layer.rank == (int(active) or layer.shape.full_rank) == own[name].rank
                gap = (layer.product() - own[name].product()).norm() / own[name].product().norm()
                self.differences.append(float(gap.detach()))


@SCORES
@pytest.mark.parametrize("average", list(AVERAGING.values()), ids=list(AVERAGING))
def test_averaged_groups_move_with_the_models(
    tiny_bert: str, tmp_path: Path, average: Callable[[], pl.Callback], score: Any
) -> None:
    """Without a learning rate the average of the weights is the weights: any other product comes from the moves."""
    task, still = make_task(tiny_bert, rankdyna(score)), StillWeights()
    trainer = make_trainer(tmp_path, max_epochs=4, callbacks=[average(), still])
    trainer.fit(task, datamodule=SyntheticData())
    assert len(task.strategy.state.history) >= 10
    assert len(still.differences) >= 12 * 20
    assert max(still.differences) < 1e-5
    assert task.compression.keep_ratio <= 0.4
    # What is in memory can be saved and read: the averaged copy has the layout of the model.
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    loaded = SequenceClassification.load_from_checkpoint(str(tmp_path / "after.ckpt"), weights_only=True)
    assert read_layout(loaded.encoder) == read_layout(task.encoder)
    for name, product in products(task).items():
        torch.testing.assert_close(products(loaded)[name], product, atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", list(STATIC.values()), ids=list(STATIC))
@pytest.mark.parametrize("average", list(AVERAGING.values()), ids=list(AVERAGING))
def test_static_methods_end_at_the_average(
    tiny_bert: str,
    tmp_path: Path,
    make: Callable[[], CompressionStrategy],
    average: Callable[[], pl.Callback],
) -> None:
    task, callback = make_task(tiny_bert, make()), average()

    class Ends(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            self.last = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    ends = Ends()
    trainer = make_trainer(tmp_path, max_epochs=3, callbacks=[ends, callback])
    trainer.fit(task, datamodule=SyntheticData())
    averaged = averaged_models(trainer)[0]
    for name, parameter in task.named_parameters():
        assert torch.equal(parameter, averaged.get_parameter(name).to(parameter.device)), name
    assert any(not torch.equal(p, ends.last[n]) for n, p in task.named_parameters() if "position" not in n)


@pytest.mark.parametrize("decay", [0.9, 0.9999])
def test_positions_are_not_averaged(tiny_bert: str, tmp_path: Path, decay: float) -> None:
    task = make_task(tiny_bert)
    trainer = make_trainer(tmp_path, max_epochs=2, callbacks=[EMAWeightAveraging(decay=decay)])
    trainer.fit(task, datamodule=SyntheticData())
    for model in (task, averaged_models(trainer)[0]):
        positions = dict(model.named_buffers())["encoder.bert.embeddings.position_ids"]
        assert torch.equal(positions.flatten(), torch.arange(128))


def test_an_average_that_starts_late_starts_at_written_factors(tiny_bert: str, tmp_path: Path) -> None:
    seen: list[dict[str, Tensor]] = []

    class Look(pl.Callback):
        def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
            seen.append(products(pl_module))

    late = EMAWeightAveraging(decay=0.9, update_starting_at_step=100)
    trainer = make_trainer(tmp_path, callbacks=[late, Look()])
    trainer.fit(make_task(tiny_bert, STATIC["fwsvd"]()), datamodule=SyntheticData())
    assert len(seen[0]) == 12
    assert all(bool(product.any()) for product in seen[0].values())


def test_averaged_copies_do_without_the_dense_originals(tiny_bert: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=[EMAWeightAveraging(decay=0.9)], limit_train_batches=1)
    trainer.fit(make_task(tiny_bert, SVD(keep_ratio=0.5)), datamodule=SyntheticData())
    assert isinstance(getattr(averaged_models(trainer)[0], "strategy"), NoCompression)  # noqa: B009


@SCORES
def test_resumes_a_shrinking_run_with_its_average(tiny_bert: str, tmp_path: Path, score: Any) -> None:
    def fit(folder: Path, path: str | None) -> Any:
        task = make_task(tiny_bert, rankdyna(score))
        every = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
        trainer = make_trainer(folder, max_epochs=3, callbacks=[EMAWeightAveraging(decay=0.9), every])
        trainer.fit(task, datamodule=SyntheticData(), ckpt_path=path)
        return task

    whole = fit(tmp_path / "whole", None)
    path = str(tmp_path / "whole" / "epoch=0.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["state_dict"].keys() == checkpoint["current_model_state"].keys()
    resumed = fit(tmp_path / "resumed", path)
    assert resumed.compression.keep_ratio <= 0.4
    assert resumed.at_budget
    assert len(resumed.strategy.state.history) == len(whole.strategy.state.history)
    found = make_trainer(tmp_path).test(
        SequenceClassification(tiny_bert), SyntheticData(), ckpt_path=path, verbose=False
    )
    assert "test/score" in found[0]
