"""What runs leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lowrank_pl.monitoring import RankDashboard, RankHistory, ReportWriter, rank_heatmap, write_report
from lowrank_pl.monitoring.rank_picture import grid_position
from lowrank_pl.monitoring.report import to_markdown
from lowrank_pl.strategies import FWSVD, SVD, RankDyna
from tests.support.runs import last_checkpoint, make_task, make_trainer
from tests.support.synthetic import SyntheticData


@pytest.fixture
def run(tiny_bert: str, tmp_path: Path) -> Path:
    """The folder of a compressed fit."""
    task = make_task(tiny_bert, FWSVD("both", keep_ratio=0.5))
    trainer = make_trainer(tmp_path, callbacks=[ReportWriter(), RankDashboard()], limit_train_batches=2)
    trainer.fit(task, datamodule=SyntheticData())
    assert trainer.log_dir is not None
    return Path(trainer.log_dir)


def test_fit_report(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    assert (report["verb"], report["task"], report["metric"], report["method"]) == ("fit", "synthetic", "f1", "FWSVD")
    assert report["score"] == report["metrics"]["f1"]
    parameters = report["parameters"]
    assert parameters["targeted_dense"] == 16384
    assert parameters["targeted_kept"] == sum(layer["parameters"] for layer in report["layers"]) == 7936
    assert parameters["total_dense"] - parameters["total"] == 16384 - 7936
    assert report["keep_ratio"] == 7936 / 16384
    assert set(report["layers"][0]) == {"name", "out", "in", "rank", "kind", "parameters", "weighted_error", "error"}
    assert all(0 < layer["weighted_error"] < layer["error"] < 1 for layer in report["layers"])
    assert report["seconds"] > 0
    assert {"python", "lowrank_pl", "torch", "lightning", "transformers"} <= set(report["versions"])
    assert Path(report["checkpoint"]).exists()
    assert report["steps"] == 2


def test_markdown_twin_has_every_layer(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    text = (run / "report.md").read_text()
    assert text == to_markdown(report)
    assert all(f"| {layer['name']} |" in text for layer in report["layers"])


def test_tensorboard_of_a_resumed_run_shows_its_ranks(tiny_bert: str, tmp_path: Path) -> None:
    def fit(epochs: int, **options: Any) -> Any:
        task = make_task(tiny_bert, FWSVD("both", keep_ratio=0.5))
        trainer = make_trainer(tmp_path, callbacks=[RankDashboard()], limit_train_batches=2, max_epochs=epochs)
        trainer.fit(task, datamodule=SyntheticData(), **options)
        return trainer

    trainer = fit(2, ckpt_path=last_checkpoint(fit(1)))
    ranks = EventAccumulator(trainer.log_dir).Reload().Scalars("rank/bert.encoder.layer.0.attention.self.query")
    assert [(event.step, event.value) for event in ranks] == [(2, 8)]


def test_tensorboard_shows_ranks_errors_losses_and_scores(run: Path) -> None:
    events = EventAccumulator(str(run)).Reload()
    scalars, layer = set(events.Tags()["scalars"]), "bert.encoder.layer.0.attention.self.query"
    assert {"train/loss", "val/loss", "val/score", "compression/keep_ratio"} <= scalars
    assert {f"rank/{layer}", f"error/{layer}", f"weighted_error/{layer}"} <= scalars
    assert events.Scalars(f"rank/{layer}")[0].value == 8
    assert "compression/ranks" in events.Tags()["images"]


def test_rank_picture_is_written(run: Path) -> None:
    assert (run / "ranks.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_dense_test_report(tiny_bert: str, tmp_path: Path) -> None:
    task = make_task(tiny_bert)
    trainer = make_trainer(tmp_path, callbacks=[ReportWriter()])
    trainer.test(task, SyntheticData(), verbose=False)
    assert trainer.log_dir is not None
    report = json.loads((Path(trainer.log_dir) / "report.json").read_text())
    assert (report["verb"], report["split"], report["keep_ratio"]) == ("test", "test", 1.0)
    assert report["parameters"]["total"] == report["parameters"]["total_dense"]
    assert {layer["kind"] for layer in report["layers"]} == {"dense"}
    assert not (Path(trainer.log_dir) / "ranks.png").exists()


def test_an_older_report_is_kept(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    assert write_report({**report, "task": "other"}, run).name == "report-2.json"
    assert json.loads((run / "report.json").read_text())["task"] == "synthetic"
    assert "other" in (run / "report-2.md").read_text()


def test_two_runs_in_one_folder_keep_their_pictures_and_reports(tiny_bert: str, tmp_path: Path) -> None:
    task = make_task(tiny_bert, FWSVD("both", keep_ratio=0.5))
    trainer = make_trainer(tmp_path, callbacks=[ReportWriter()], limit_train_batches=1)
    trainer.fit(task, datamodule=SyntheticData())
    folder = Path(str(trainer.log_dir))
    fitted = (folder / "ranks.png").read_bytes()
    (folder / "ranks.png").write_bytes(b"of the first run")
    for _ in range(2):
        trainer.test(task, SyntheticData(), verbose=False)
    assert (folder / "ranks.png").read_bytes() == b"of the first run"
    assert (folder / "ranks-2.png").read_bytes() == (folder / "ranks-3.png").read_bytes() == fitted
    verbs = [json.loads((folder / f"report{n}.json").read_text())["verb"] for n in ("", "-2", "-3")]
    assert verbs == ["fit", "test", "test"]
    assert json.loads((folder / "report.json").read_text())["checkpoint_monitor"] is None


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("bert.encoder.layer.3.attention.self.query", "3", "attention.self.query"),
        ("model.layers.11.mlp.Wi", "11", "mlp.Wi"),
        ("mobilebert.encoder.layer.2.ffn.0.output.dense", "2", "ffn.0.output.dense"),
        ("pooler", "-", "pooler"),
    ],
)
def test_grid_positions(name: str, block: str, kind: str) -> None:
    assert grid_position(name) == (block, kind)


def test_heat_map_has_a_number_in_every_cell(tiny_bert: str, tmp_path: Path) -> None:
    from lowrank_pl.monitoring.report import layer_records

    task = make_task(tiny_bert, SVD(keep_ratio=0.5))
    make_trainer(tmp_path).compress(task, SyntheticData(), output=str(tmp_path / "out"))
    axes = rank_heatmap(layer_records(task)).axes[0]
    assert sorted(text.get_text() for text in axes.texts) == ["10"] * 4 + ["8"] * 8


class Described(SyntheticData):
    """Data that tell what they hold."""

    def describe(self) -> dict[str, Any]:
        return {"fingerprint": "abc123", "samples": {"train": 1234, "validation": 24}}


def test_data_are_told_where_they_can_be(tiny_bert: str, tmp_path: Path, run: Path) -> None:
    assert json.loads((run / "report.json").read_text())["data"] is None
    assert "fingerprint" not in (run / "report.md").read_text()
    trainer = make_trainer(tmp_path / "told", callbacks=[ReportWriter()], limit_train_batches=1)
    trainer.fit(make_task(tiny_bert), datamodule=Described())
    folder = Path(str(trainer.log_dir))
    told = json.loads((folder / "report.json").read_text())["data"]
    assert told == {"fingerprint": "abc123", "samples": {"train": 1234, "validation": 24}}
    text, report = (folder / "report.md").read_text(), json.loads((folder / "report.json").read_text())
    assert "samples: train 1,234, validation 24; data fingerprint `abc123`" in text
    assert "scored:" not in text
    scored = to_markdown({**report, "verb": "test", "data": {**told, "scored": "validation"}})
    assert "* scored: the validation split, for want of a test split with labels" in scored
    assert "scored:" not in to_markdown({**report, "verb": "test", "data": {**told, "scored": "test"}})


def test_a_report_says_of_which_step_its_score_is(tiny_bert: str, tmp_path: Path) -> None:
    def fit(folder: str, path: str | None = None, **arguments: Any) -> tuple[pl.Trainer, dict[str, Any], Path]:
        task, callbacks = make_task(tiny_bert, RankDyna(keep_ratio=0.4)), [ReportWriter(), RankHistory()]
        trainer = make_trainer(tmp_path / folder, callbacks=callbacks, **{"max_epochs": 2, **arguments})
        trainer.fit(task, datamodule=SyntheticData(), ckpt_path=path)
        place = Path(trainer.log_dir or "")
        return trainer, json.loads((place / "report.json").read_text()), place

    trainer, whole, _ = fit("whole")
    assert (whole["score_step"], whole["notes"]) == (12, [])
    # Killed after its last checkpoint, before its report: there is nothing left to do, and nothing is lost.
    _, resumed, place = fit("resumed", last_checkpoint(trainer))
    assert (resumed["metrics"], resumed["score_step"]) == (whole["metrics"], 12)
    told = f"no step was left to train: the score is that of the run that wrote {last_checkpoint(trainer)!r}"
    assert resumed["notes"] == [*whole["notes"], told]
    assert resumed["parameters"] == whole["parameters"]
    assert (place / "rank_history.json").exists()
    _, short, _ = fit("between", val_check_interval=4)
    assert (short["score_step"], short["steps"]) == (10, 12)
    assert short["notes"] == ["the score is that of step 10: no validation followed the last, 12"]
    _, unscored, _ = fit("unscored", max_steps=3)
    assert (unscored["score"], unscored["score_step"]) == (None, None)
    assert unscored["notes"][-1].startswith("no validation ran, so there is no score")
