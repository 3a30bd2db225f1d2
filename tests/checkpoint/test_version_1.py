"""Files with a layout of version 1, kept in tests/fixtures/v1, load by every way with the logits they had then."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from lowrank_pl import from_pretrained
from lowrank_pl.export import export
from lowrank_pl.importance import FirstOrder
from lowrank_pl.strategies import SVD, NoCompression, RankDyna
from lowrank_pl.surgery import read_layout, svd_layers
from lowrank_pl.tasks import SequenceClassification
from tests.support.runs import last_checkpoint, make_task, make_trainer
from tests.support.synthetic import SyntheticData
from tests.support.tiny import save_tiny_model

FILES = Path(__file__).parents[1] / "fixtures" / "v1"
EXPECTED = torch.load(FILES / "expected.pt", weights_only=True)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    result: Tensor = model.eval()(**EXPECTED["inputs"]).logits
    return result


def check(model: Any, name: str) -> None:
    """Logits differ by about 1e-3 between inputs, and layers are factorised."""
    assert len(read_layout(model).modules) == 6
    torch.testing.assert_close(logits(model), EXPECTED["logits"][name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("compressed", "compressed"),
        ("compressed/model.ckpt", "compressed"),
        ("exported", "exported"),
        ("rankdyna.ckpt", "rankdyna"),
        ("svd.ckpt", "svd"),
    ],
)
def test_as_init_from(path: str, name: str) -> None:
    task = make_task(None, init_from=str(FILES / path))
    task.build()
    check(task.encoder, name)
    assert not svd_layers(task.encoder)


def rankdyna() -> RankDyna:
    """What was the default then."""
    return RankDyna(keep_ratio=0.4, sensitivity=FirstOrder(), allow_dense=False)


@pytest.mark.parametrize("path", ["compressed/model.ckpt", "rankdyna.ckpt", "svd.ckpt"])
def test_as_a_lightning_checkpoint(path: str) -> None:
    task = SequenceClassification.load_from_checkpoint(FILES / path, map_location="cpu")
    check(task.encoder, Path(path).stem if path != "compressed/model.ckpt" else "compressed")


@pytest.mark.parametrize("path", ["compressed/model.ckpt", "rankdyna.ckpt", "svd.ckpt"])
def test_as_the_checkpoint_to_test(path: str, tmp_path: Path) -> None:
    strategy = {
        "rankdyna.ckpt": rankdyna(),
        "svd.ckpt": SVD(keep_ratio=0.4),
    }.get(path, NoCompression())
    task = make_task(None, strategy, init_from=str(FILES / "compressed"))
    make_trainer(tmp_path, logger=False).test(task, SyntheticData(), ckpt_path=str(FILES / path))
    check(task.encoder, Path(path).stem if path != "compressed/model.ckpt" else "compressed")


@pytest.mark.parametrize(("path", "name"), [("rankdyna.ckpt", "rankdyna"), ("svd.ckpt", "svd")])
def test_a_run_goes_on_as_it_would_have(path: str, name: str, tmp_path: Path) -> None:
    """The optimizer's state lies beside parameters by their order, which therefore is what it was."""
    strategy = rankdyna() if name == "rankdyna" else SVD(keep_ratio=0.4)
    dense = export(str(FILES / path), str(tmp_path / "dense"), "dense", tokenizer=tokenizer(tmp_path))
    task = make_task(None, strategy, init_from=str(dense))
    trainer = make_trainer(tmp_path, max_epochs=2)
    trainer.fit(task, datamodule=SyntheticData(), ckpt_path=str(FILES / path))
    assert trainer.global_step == 12
    check(task.encoder, f"{name}-resumed")
    again = make_task(None, init_from=last_checkpoint(trainer))
    again.build()
    check(again.encoder, f"{name}-resumed")


def test_an_exported_folder_loads_here_and_is_written_anew_with_the_current_layout(tmp_path: Path) -> None:
    model = from_pretrained(str(FILES / "exported"))
    check(model, "exported")
    model.save_pretrained(tmp_path / "again")
    check(from_pretrained(str(tmp_path / "again")), "exported")
    assert '"version": 2' in (tmp_path / "again" / "config.json").read_text(encoding="utf-8")


def test_an_exported_folder_loads_by_its_own_module_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    shutil.copytree(FILES / "exported", tmp_path / "exported")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    torch.testing.assert_close(logits(model), EXPECTED["logits"]["exported"], rtol=1e-4, atol=1e-7)


def test_a_checkpoint_is_exported_with_the_current_layout(tmp_path: Path) -> None:
    where = export(str(FILES / "rankdyna.ckpt"), str(tmp_path / "out"), tokenizer=tokenizer(tmp_path))
    check(from_pretrained(str(where)), "rankdyna")


def tokenizer(folder: Path) -> str:
    return str(save_tiny_model("bert", folder / "tokenizer"))
