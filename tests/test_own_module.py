"""docs/own_module.md as a stranger follows it, and LightningModules that know nothing of this package."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn

from lowrank_pl.errors.arguments import MissingArgumentError
from lowrank_pl.errors.numerics import LossShapeError
from lowrank_pl.errors.run import (
    CalibrationError,
    NotCompressibleError,
    StrategyPlacementError,
    UnsupportedCallbackError,
)
from lowrank_pl.monitoring import ReportWriter
from lowrank_pl.nn import LowRankLinear, SVDLinear
from lowrank_pl.strategies import (
    FWSVD,
    SVD,
    TFWSVD,
    Calibration,
    CompressionStrategy,
    KroneckerSVD,
    RankDyna,
    Recalibration,
)
from lowrank_pl.surgery import read_layout
from lowrank_pl.trainer import LowRankTrainer

PAGE = (Path(__file__).parents[1] / "docs" / "own_module.md").read_text(encoding="utf-8")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
(CODE,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "max_epochs": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """The classes of the page, without its run."""
    names: dict[str, Any] = {"__name__": "own_module"}
    exec(compile(CODE.partition("\n\nsizes = ")[0], "docs/own_module.md", "exec"), names)
    return names


@pytest.fixture
def make(page: dict[str, Any]) -> Any:
    def make() -> Any:
        pl.seed_everything(0, verbose=False)
        return page["ImageClassifier"](image_size=16, patch_size=4, num_labels=2, **SIZES)

    return make


def test_the_page_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "own_module"}
    exec(compile(CODE, "docs/own_module.md", "exec"), names)
    assert "0.50 of the targeted weights kept" in capsys.readouterr().out
    trained, loaded = names["module"].eval(), names["small"].eval()
    assert type(names["trainer"]) is pl.Trainer
    assert read_layout(loaded.encoder).modules
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(loaded.encoder(images).logits, trained.encoder(images).logits)


@pytest.mark.parametrize(
    "strategy",
    [
        SVD(keep_ratio=0.5),
        FWSVD(keep_ratio=0.5),
        TFWSVD(keep_ratio=0.5),
        KroneckerSVD(keep_ratio=0.5, recalibration=Recalibration()),
    ],
    ids=lambda strategy: type(strategy).__name__,
)
def test_static_methods_work_without_tokens_and_masks(
    strategy: CompressionStrategy, page: dict[str, Any], make: Any, tmp_path: Path
) -> None:
    module = make()
    pl.Trainer(**QUIET, default_root_dir=tmp_path, callbacks=[strategy]).fit(module, datamodule=page["Images"]())
    assert module.compression.method == type(strategy).__name__
    assert 0.4 < module.compression.keep_ratio <= 0.5
    assert all(
        isinstance(module.encoder.get_submodule(name), LowRankLinear) for name in read_layout(module.encoder).modules
    )
    if isinstance(strategy, KroneckerSVD):
        assert "recalibrated on 32 outputs" in module.compression.notes[-1]


@pytest.mark.parametrize("sequential", [False, True])
def test_what_is_outside_of_the_encoder_is_measured_in_eval_mode_too(
    sequential: bool, page: dict[str, Any], tmp_path: Path
) -> None:
    base: Any = page["ImageClassifier"]

    class Augmenting(base):  # type: ignore[misc]
        def __init__(self, **config: Any) -> None:
            super().__init__(**config)
            self.norm = nn.BatchNorm2d(3)
            self.modes: set[bool] = set()

        def per_sample_losses(self, batch: Any) -> Any:
            images, labels = batch
            self.modes |= {self.training, self.norm.training}
            return super().per_sample_losses((self.norm(images), labels))

    torch.manual_seed(0)
    module = Augmenting(image_size=16, patch_size=4, num_labels=2, **SIZES)
    strategy = KroneckerSVD(
        keep_ratio=0.5, refit=True, recalibration=True, sequential=sequential, calibration=Calibration(cache=False)
    )
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 0}, default_root_dir=tmp_path, callbacks=[strategy])
    trainer.fit(module, datamodule=page["Images"]())
    assert len(module.compression.notes) >= 1 + (not sequential)
    assert module.modes == {False}
    assert module.norm.num_batches_tracked == 0  # BatchNorm's statistics are no part of a measurement
    assert module.norm.training
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_shrinking_ranks_work_without_tokens_and_masks(page: dict[str, Any], make: Any, tmp_path: Path) -> None:
    module, strategy = make(), RankDyna(keep_ratio=0.5)
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 3}, default_root_dir=tmp_path, callbacks=[strategy])
    trainer.fit(module, datamodule=page["Images"]())
    assert strategy.at_budget
    assert module.compression.keep_ratio <= 0.5
    assert not any(isinstance(part, SVDLinear) for part in module.encoder.modules())


def test_a_module_may_own_its_strategy(page: dict[str, Any], tmp_path: Path) -> None:
    base: Any = page["ImageClassifier"]

    class Owner(base):  # type: ignore[misc]
        def configure_callbacks(self) -> list[pl.Callback]:
            return [self.strategy]

    module = Owner(image_size=16, patch_size=4, num_labels=2, **SIZES)
    module.strategy = SVD(keep_ratio=0.5)
    trainer = pl.Trainer(**QUIET, default_root_dir=tmp_path)
    trainer.fit(module, datamodule=page["Images"]())
    assert module.compression.method == "SVD"
    ranks = read_layout(module.encoder)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, datamodule=page["Images"]())  # not factorised a second time
    assert read_layout(module.encoder) == ranks
    with pytest.raises(StrategyPlacementError, match="the model has another"):
        pl.Trainer(**QUIET, callbacks=[FWSVD(keep_ratio=0.5)]).validate(module, page["Images"]())


def test_a_stopped_run_goes_on(page: dict[str, Any], make: Any, tmp_path: Path) -> None:
    arguments = {**QUIET, "default_root_dir": tmp_path, "max_epochs": 1}
    trainer = pl.Trainer(**arguments, callbacks=[KroneckerSVD(keep_ratio=0.5)])
    first = make()
    trainer.fit(first, datamodule=page["Images"]())
    path = trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    second = make()
    trainer = pl.Trainer(**{**arguments, "max_epochs": 2}, callbacks=[KroneckerSVD(keep_ratio=0.5)])
    trainer.fit(second, datamodule=page["Images"](), ckpt_path=path)
    assert trainer.global_step == 8
    assert read_layout(second.encoder) == read_layout(first.encoder)


def test_an_encoder_that_configure_model_makes(page: dict[str, Any], tmp_path: Path) -> None:
    base: Any = page["ImageClassifier"]

    class Late(base):  # type: ignore[misc]
        def __init__(self, **config: Any) -> None:
            super().__init__(**config)
            del self.encoder

        def configure_model(self) -> None:
            if not hasattr(self, "encoder"):
                self.encoder = page["ViTForImageClassification"](page["ViTConfig"](**self.hparams))

    module = Late(image_size=16, patch_size=4, num_labels=2, **SIZES)
    trainer = pl.Trainer(**QUIET, default_root_dir=tmp_path, callbacks=[SVD(keep_ratio=0.5)])
    trainer.fit(module, datamodule=page["Images"]())
    assert read_layout(module.encoder).modules


def test_compress_scores_before_and_after(
    page: dict[str, Any], make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, out = make(), tmp_path / "out"
    trainer = LowRankTrainer(**QUIET, default_root_dir=tmp_path, callbacks=[FWSVD(keep_ratio=0.5)])
    trainer.compress(module, page["Images"](), str(out))
    assert re.search(r"ImageClassifier val/loss: 0\.\d+ before, 0\.\d+ after FWSVD", capsys.readouterr().out)
    assert sorted(path.name for path in out.iterdir()) == ["model.ckpt", "ranks.png", "report.json", "report.md"]
    loaded = page["ImageClassifier"].load_from_checkpoint(out / "model.ckpt", weights_only=True)
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(loaded.eval().encoder(images).logits, module.eval().encoder(images).logits)


def test_diagnose_needs_no_strategy(page: dict[str, Any], make: Any, tmp_path: Path) -> None:
    module, out = make(), tmp_path / "out"
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    LowRankTrainer(**QUIET, default_root_dir=tmp_path).diagnose(module, page["Images"](), str(out))
    assert sorted(path.name for path in out.iterdir()) == ["diagnosis.json", "diagnosis.md", "diagnosis.png"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_compress_without_a_strategy_is_refused(page: dict[str, Any], make: Any, tmp_path: Path) -> None:
    with pytest.raises(MissingArgumentError, match=r"a strategy is missing.*callbacks="):
        LowRankTrainer(**QUIET).compress(make(), page["Images"](), str(tmp_path / "out"))


def test_reports_tell_of_any_module(page: dict[str, Any], make: Any, tmp_path: Path) -> None:
    arguments = {**QUIET, "default_root_dir": tmp_path}
    pl.Trainer(**arguments, callbacks=[SVD(keep_ratio=0.5), ReportWriter()]).fit(make(), datamodule=page["Images"]())
    told = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert told.startswith("# fit: ImageClassifier with SVD")
    assert "score (" not in told
    assert "| loss | 0." in told


def test_what_a_module_lacks_is_told(page: dict[str, Any], make: Any, tmp_path: Path) -> None:
    class Empty(pl.LightningModule):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            raise AssertionError

        def configure_optimizers(self) -> None:
            return None

    data = page["Images"]()
    with pytest.raises(NotCompressibleError, match="SVD cannot work on Empty: it has no 'encoder'"):
        pl.Trainer(**QUIET, callbacks=[SVD(keep_ratio=0.5)]).fit(Empty(), datamodule=data)

    class Lossless(Empty):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = make().encoder

    with pytest.raises(NotCompressibleError, match="FWSVD cannot work on Lossless: it has no 'per_sample_losses'"):
        pl.Trainer(**QUIET, callbacks=[FWSVD(keep_ratio=0.5)]).fit(Lossless(), datamodule=data)
    data.setup("fit")
    with pytest.raises(CalibrationError, match="no datamodule was given"):
        pl.Trainer(**QUIET, callbacks=[FWSVD(keep_ratio=0.5)]).fit(make(), data.train_dataloader())


def test_a_mean_over_the_batch_is_refused(page: dict[str, Any], make: Any) -> None:
    base: Any = page["ImageClassifier"]

    class Mean(base):  # type: ignore[misc]
        def per_sample_losses(self, batch: Any) -> torch.Tensor:
            losses: torch.Tensor = super().per_sample_losses(batch)
            return losses.mean()

    module = Mean(image_size=16, patch_size=4, num_labels=2, **SIZES)
    with pytest.raises(LossShapeError, match=r"has shape \[\], where it has to be a tensor of shape \[2\]"):
        pl.Trainer(**QUIET, callbacks=[FWSVD(keep_ratio=0.5)]).fit(module, datamodule=page["Images"]())


def test_copies_of_the_dense_model_are_refused(page: dict[str, Any], make: Any) -> None:
    average = EMAWeightAveraging()
    with pytest.raises(UnsupportedCallbackError, match=r"Name SVD first: Trainer\(callbacks=\[SVD"):
        pl.Trainer(**QUIET, callbacks=[average, SVD(keep_ratio=0.5)]).fit(make(), datamodule=page["Images"]())


def test_optional_attributes_get_their_defaults_and_properties_are_left_alone() -> None:
    from lowrank_pl.strategies.base import as_compressible

    class Resuming(pl.LightningModule):
        @property
        def layout_to_resume(self) -> None:
            raise AssertionError("computed")

    module = Resuming()
    module.encoder = nn.Identity()
    found = as_compressible(module, "SVD", "encoder")
    assert found is module  # type: ignore[comparison-overlap]
    assert (found.compression, found.target, found.freshly_initialised_head, found.prepared_by) == (
        None,
        None,
        False,
        None,
    )
