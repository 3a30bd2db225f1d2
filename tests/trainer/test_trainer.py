"""The verbs compress and inspect."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_pl.core import LinearShape
from lowrank_pl.errors.arguments import MissingArgumentError
from lowrank_pl.errors.numerics import BudgetError, MemoryBoundError, RatioError
from lowrank_pl.errors.outputs import OutputExistsError, OutputNotWritableError
from lowrank_pl.errors.run import CalibrationError, NothingToCompressError, NothingToScoreError
from lowrank_pl.importance import FullFisher, SecondMoments
from lowrank_pl.monitoring import diagnosis_report
from lowrank_pl.nn import LowRankLinear
from lowrank_pl.strategies import FWSVD, SVD, Calibration, KroneckerSVD, NoCompression
from lowrank_pl.strategies.calibration import measure_importance
from lowrank_pl.tasks import SequenceClassification
from lowrank_pl.trainer import LowRankTrainer, diagnoser
from lowrank_pl.trainer import trainer as trainer_module
from tests.support.runs import last_checkpoint, make_task, make_trainer
from tests.support.synthetic import SyntheticData


@pytest.fixture
def tuned(tiny_bert: str, tmp_path: Path) -> str:
    """The checkpoint of a dense model."""
    trainer = make_trainer(tmp_path / "dense")
    trainer.fit(make_task(tiny_bert), datamodule=SyntheticData())
    return last_checkpoint(trainer)


def test_compress_writes_a_model_that_loads_and_scores_the_same(tuned: str, tmp_path: Path) -> None:
    original = Path(tuned).read_bytes()
    task, out = make_task(None, FWSVD("both", keep_ratio=0.5), init_from=tuned), tmp_path / "out"
    make_trainer(tmp_path).compress(task, SyntheticData(), str(out))
    assert sorted(p.name for p in out.iterdir()) == ["model.ckpt", "ranks.png", "report.json", "report.md"]
    assert Path(tuned).read_bytes() == original
    report = json.loads((out / "report.json").read_text())
    loaded = SequenceClassification(init_from=str(out))
    results = make_trainer(tmp_path).validate(loaded, SyntheticData(), verbose=False)
    assert results[0]["val/loss"] == pytest.approx(report["metrics"]["loss"], abs=1e-6)
    dense = make_trainer(tmp_path).validate(make_task(None, init_from=tuned), SyntheticData(), verbose=False)
    assert report["metrics_dense"]["val/loss"] == pytest.approx(dense[0]["val/loss"], abs=1e-6)
    assert report["metrics"]["loss"] != pytest.approx(report["metrics_dense"]["val/loss"], abs=1e-6)
    assert report["parameters"]["targeted_kept"] == 7936
    assert report["options"]["calibration_samples"] == 48


def test_compress_and_the_first_step_of_fit_agree(tuned: str, tmp_path: Path) -> None:
    make_trainer(tmp_path).compress(
        make_task(None, SVD(keep_ratio=0.5), init_from=tuned), SyntheticData(), str(tmp_path / "out")
    )
    compressed = make_task(None, init_from=str(tmp_path / "out"))
    compressed.build()
    frozen = make_task(None, SVD(keep_ratio=0.5), init_from=tuned, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    make_trainer(tmp_path, limit_train_batches=1).fit(frozen, datamodule=SyntheticData())
    for name, tensor in compressed.encoder.state_dict().items():
        torch.testing.assert_close(frozen.encoder.state_dict()[name], tensor)


def test_compressed_module_can_be_trained_in_the_same_process(tuned: str, tmp_path: Path) -> None:
    task = make_task(None, SVD(keep_ratio=0.5), init_from=tuned)
    make_trainer(tmp_path).compress(task, SyntheticData(), str(tmp_path / "out"))
    factors = [p for m in task.encoder.modules() if isinstance(m, LowRankLinear) for p in m.parameters()]
    assert not any(p.is_inference() for p in factors)


def test_compress_takes_weights_from_a_checkpoint(tuned: str, tiny_bert: str, tmp_path: Path) -> None:
    task = make_task(tiny_bert, SVD(keep_ratio=0.5))
    make_trainer(tmp_path).compress(task, SyntheticData(), str(tmp_path / "a"), ckpt_path=tuned)
    other = make_task(None, SVD(keep_ratio=0.5), init_from=tuned)
    make_trainer(tmp_path).compress(other, SyntheticData(), str(tmp_path / "b"))
    state = other.encoder.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in task.encoder.state_dict().items())


def test_an_output_folder_that_holds_something_is_refused_first(tuned: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    task = make_task(None, SVD(keep_ratio=0.5), init_from=tuned)
    with pytest.raises(OutputExistsError, match="nothing is ever overwritten"):
        make_trainer(tmp_path).compress(task, SyntheticData(), str(tmp_path / "out"))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["precious"]
    assert not task.is_built


def test_compress_refusals(tuned: str, tmp_path: Path) -> None:
    trainer, data, out = make_trainer(tmp_path), SyntheticData(), str(tmp_path / "out")
    svd = make_task(None, SVD(keep_ratio=0.5), init_from=tuned)
    with pytest.raises(MissingArgumentError, match="--output"):
        trainer.compress(svd, data)
    with pytest.raises(CalibrationError, match="no datamodule"):
        trainer.compress(svd, None, out)
    with pytest.raises(NothingToCompressError, match="NoCompression"):
        trainer.compress(make_task(None, NoCompression(), init_from=tuned), data, out)
    with pytest.raises(BudgetError):
        trainer.compress(make_task(None, SVD(keep_ratio=0.01), init_from=tuned), data, out)
    assert not Path(out).exists()


def test_compress_without_validation_batches_is_refused(tuned: str, tmp_path: Path) -> None:
    task = make_task(None, SVD(keep_ratio=0.5), init_from=tuned)
    with pytest.raises(NothingToScoreError):
        make_trainer(tmp_path, limit_val_batches=0).compress(task, SyntheticData(), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_compress_into_an_impossible_place(tuned: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    task = make_task(None, SVD(keep_ratio=0.5), init_from=tuned)
    with pytest.raises(OutputNotWritableError, match="cannot be made"):
        make_trainer(tmp_path).compress(task, SyntheticData(), str(tmp_path / "file" / "out"))


def test_diagnose_tells_per_layer_and_changes_nothing(
    tuned: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, out = make_task(None, init_from=tuned), tmp_path / "out"
    make_trainer(tmp_path).diagnose(task, SyntheticData(), str(out), keep_ratio=0.5)
    assert sorted(p.name for p in out.iterdir()) == ["diagnosis.json", "diagnosis.md", "diagnosis.png"]
    fields = json.loads((out / "diagnosis.json").read_text())
    assert fields["calibration_samples"] == 48
    assert len(fields["layers"]) == 12
    for layer in fields["layers"]:
        assert layer["rank"] in (8, 10)
        assert layer["objective"]["TFWSVD"] == min(layer["objective"].values())
        assert f"| {layer['name']} |" in (out / "diagnosis.md").read_text()
        rises = layer["full_rise"]
        assert list(rises) == [
            "SVD",
            *(f"FWSVD {side}" for side in ("input", "output", "both")),
            "KroneckerSVD",
            "TFWSVD",
        ]
        assert rises[layer["recommendation"]] <= 1.1 * min(rises.values())
        assert 0 < layer["energy_lost"] < 1
    told = capsys.readouterr().out
    assert "recommended" in told
    assert "Global ranks of the same budget" in told
    assert fields["energy_lost"]["global"] < fields["energy_lost"]["uniform"]
    strategy = KroneckerSVD(keep_ratio=0.5)
    compressed = make_task(None, strategy, init_from=tuned)
    make_trainer(tmp_path).compress(compressed, SyntheticData(), output=str(tmp_path / "compressed"))
    chosen = {layer.name: layer.rank if layer.kind == "low_rank" else None for layer in compressed.compression.layers}
    assert {layer["name"]: layer["global_rank"] for layer in fields["layers"]} == chosen
    reference = make_task(None, init_from=tuned)
    reference.build()
    state = reference.encoder.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in task.encoder.state_dict().items())


def test_diagnose_takes_the_budget_of_the_strategy(
    tuned: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases: list[tuple[Any, float | None, float, str]] = [
        (SVD(keep_ratio=0.5), None, 0.5, "the strategy's"),
        (SVD(keep_ratio=0.5), 0.4, 0.4, "as asked"),
        (SVD(rank_ratio=0.5), None, 0.33, "by default"),
        (None, None, 0.33, "by default"),
    ]
    for at, (strategy, asked, ratio, told) in enumerate(cases):
        out = tmp_path / str(at)
        make_trainer(tmp_path).diagnose(
            make_task(None, strategy, init_from=tuned), SyntheticData(size=8), str(out), asked
        )
        assert f"methods compared at keep_ratio {ratio:g} ({told})" in capsys.readouterr().out
        fields = json.loads((out / "diagnosis.json").read_text())
        assert (fields["keep_ratio"], fields["keep_ratio_from"]) == (ratio, told)


def test_diagnose_keeps_to_its_memory_and_says_the_same(
    tuned: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = (FullFisher(), SecondMoments())
    largest = sum(kind.bytes(LinearShape(64, 32)) for kind in kinds) / 2**30
    measured: list[int] = []

    def noting(trainer: Any, module: Any, layers: Any, *rest: Any) -> Any:
        measured.append(len(layers))
        return measure_importance(trainer, module, layers, *rest)

    monkeypatch.setattr(diagnoser, "measure_importance", noting)
    found = []
    for at, bound in enumerate((None, largest)):
        measured.clear()
        strategy = KroneckerSVD(keep_ratio=0.5, calibration=Calibration(max_memory=bound, cache=False))
        out = tmp_path / str(at)
        make_trainer(tmp_path).diagnose(make_task(None, strategy, init_from=tuned), SyntheticData(), str(out))
        assert sum(measured) == 3 * 12  # two kinds, and what factors do
        assert (max(measured) == 12) == (bound is None)
        found.append(json.loads((out / "diagnosis.json").read_text()))
    for layers in zip(*(fields["layers"] for fields in found), strict=True):
        assert layers[0]["full_rise"] == pytest.approx(layers[1]["full_rise"], rel=1e-6)
        assert layers[0]["global_rank"] == layers[1]["global_rank"]
    strategy = KroneckerSVD(keep_ratio=0.5, calibration=Calibration(max_memory=largest / 2, cache=False))
    with pytest.raises(MemoryBoundError, match="dense"):
        make_trainer(tmp_path).diagnose(
            make_task(None, strategy, init_from=tuned), SyntheticData(), str(tmp_path / "x")
        )
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("verb", ["compress", "diagnose"])
@pytest.mark.parametrize("where", ["first", "last"])
def test_a_full_disk_leaves_no_folder(
    tuned: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, where: str
) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    task = make_task(None, SVD(keep_ratio=0.5), init_from=tuned)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def half(self: Any, path: Path, *args: Any, **kwargs: Any) -> None:
        Path(path).write_bytes(b"half of it")
        full()

    logger = {"logger": False}
    if (verb, where) == ("compress", "first"):
        monkeypatch.setattr(LowRankTrainer, "save_checkpoint", half)
    elif verb == "compress":
        monkeypatch.setattr(trainer_module, "save_rank_picture", full)
    else:
        monkeypatch.setattr(diagnosis_report, "diagnosis_table" if where == "first" else "diagnosis_figure", full)
    with pytest.raises(OutputNotWritableError, match=r"out' cannot be made \(.*No space left"):
        getattr(make_trainer(tmp_path, **logger), verb)(task, SyntheticData(), str(tmp_path / "a" / "out"))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name not in ("cache", "checkpoints")) == before


def test_diagnose_refusals(tuned: str, tmp_path: Path) -> None:
    task, data = make_task(None, init_from=tuned), SyntheticData()
    with pytest.raises(RatioError, match="keep_ratio=0"):
        make_trainer(tmp_path).diagnose(task, data, str(tmp_path / "out"), keep_ratio=0.0)
    with pytest.raises(CalibrationError, match="diagnose needs calibration"):
        make_trainer(tmp_path).diagnose(task, None, str(tmp_path / "out"))
    with pytest.raises(MissingArgumentError, match="--output"):
        make_trainer(tmp_path).diagnose(task, data)


def test_inspect_needs_no_data_and_tells_everything(
    tiny_bert: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_trainer(tmp_path).inspect(make_task(tiny_bert, SVD(keep_ratio=0.5)))
    text = capsys.readouterr().out
    lines = {line.split()[0]: line for line in text.splitlines() if line}
    query = lines["bert.encoder.layer.0.attention.self.query"].split()
    assert query[1:] == ["32", "32", "1,024", "64", "16", "8", "512", "targeted"]
    assert lines["classifier"].endswith("outside the transformer blocks")
    assert "floor: 896 of 16,384 parameters of the targeted layers: no keep_ratio can go below 0.0547" in text
    assert "12 layers factorised, 0 dense; keeps 7,936 of 16,384 parameters (keep_ratio 0.4844)" in text


def test_inspect_shows_an_impossible_budget_with_its_floor(
    tiny_bert: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And refuses it, so that a script notices."""
    with pytest.raises(BudgetError, match=r"keep_ratio=0\.01"):
        make_trainer(tmp_path).inspect(make_task(tiny_bert, SVD(keep_ratio=0.01)))
    assert "floor: 896" in capsys.readouterr().out


def test_inspect_tells_what_block_by_block_takes_from_a_configuration_alone(
    tiny_bert: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text((Path(tiny_bert) / "config.json").read_text())
    task = make_task(str(tmp_path), KroneckerSVD(keep_ratio=0.5, sequential=True))
    make_trainer(tmp_path / "runs").inspect(task)
    with_weights = make_task(tiny_bert, KroneckerSVD(keep_ratio=0.5, sequential=True))
    told = capsys.readouterr().out
    make_trainer(tmp_path / "runs").inspect(with_weights)
    assert capsys.readouterr().out == told
    assert not task.is_built
    assert "memory block by block: at most 0.00 GiB" in told
    assert "(512 samples of one token; multiply by their length)" in told


@pytest.mark.parametrize(("precision", "size"), [("32-true", 4), ("bf16-true", 2), ("64-true", 8), ("bf16-mixed", 4)])
def test_inspect_counts_the_bytes_that_a_parameter_has_in_the_run(
    precision: str, size: int, tiny_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[int]()

    def told_beforehand(_: KroneckerSVD, encoder: object, item: int, tokens: int | None) -> list[str]:
        asked.append(item)
        return []

    monkeypatch.setattr(KroneckerSVD, "told_beforehand", told_beforehand)
    task = make_task(tiny_bert, KroneckerSVD(keep_ratio=0.5))
    make_trainer(tmp_path, precision=precision).inspect(task)
    assert asked == [size]


def test_inspect_shows_factorised_layers(tuned: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = make_task(None, SVD(keep_ratio=0.5), init_from=tuned)
    make_trainer(tmp_path).compress(task, SyntheticData(), str(tmp_path / "out"))
    make_trainer(tmp_path).inspect(make_task(None, init_from=str(tmp_path / "out")))
    assert capsys.readouterr().out.count("factorised already") == 12
