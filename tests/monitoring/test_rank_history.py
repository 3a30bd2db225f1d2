"""What a person sees of shrinking ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lowrank_pl.allocation import Cost, CubicSchedule
from lowrank_pl.core import LinearShape
from lowrank_pl.monitoring import RankHistory
from lowrank_pl.monitoring.rank_flow import flow_figure, kept_by_kind
from lowrank_pl.strategies import SVD, RankDyna, RankPlan, Reallocation
from tests.support.runs import make_task, make_trainer
from tests.support.synthetic import SyntheticData

KINDS = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
KINDS += ["intermediate.dense", "output.dense"]


@pytest.fixture(scope="module")
def run(tiny_bert: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    task = make_task(tiny_bert, RankDyna(keep_ratio=0.4, schedule=CubicSchedule(0.0, 0.4, 0.1)))
    trainer = make_trainer(tmp_path_factory.mktemp("history"), max_epochs=2, callbacks=[RankHistory()])
    trainer.fit(task, datamodule=SyntheticData())
    return task, Path(str(trainer.log_dir))


@pytest.fixture(scope="module")
def events(run: tuple[Any, Path]) -> EventAccumulator:
    accumulator = EventAccumulator(str(run[1]), size_guidance={"images": 0, "histograms": 0})
    accumulator.Reload()
    return accumulator


def test_every_reallocation_is_a_point_of_every_curve(run: tuple[Any, Path], events: EventAccumulator) -> None:
    history = run[0].strategy.state.history
    assert len(history) > 4
    names = list(history[0].ranks)
    tags = ["budget/kept", "budget/scheduled", *(f"rank/{name}" for name in names)]
    for tag in [*tags, *(f"kept_by_kind/{kind}" for kind in KINDS)]:
        assert [event.step for event in events.Scalars(tag)] == [entry.step for entry in history], tag
    for name in names:
        values = [event.value for event in events.Scalars(f"rank/{name}")]
        assert values == [entry.ranks[name] for entry in history]
    kept = [event.value for event in events.Scalars("budget/kept")]
    assert kept == pytest.approx([entry.kept / 16384 for entry in history])
    together = [sum(event.value for event in step) for step in zip(*map(events.Scalars, _kinds()), strict=True)]
    assert together == pytest.approx(kept)


def _kinds() -> list[str]:
    return [f"kept_by_kind/{kind}" for kind in KINDS]


def test_pictures_histograms_table_and_hyper_parameters(run: tuple[Any, Path], events: EventAccumulator) -> None:
    steps = [entry.step for entry in run[0].strategy.state.history]
    assert [image.step for image in events.Images("ranks")] == steps
    for kind in KINDS:
        histograms = events.Histograms(f"importance/{kind}")
        assert [histogram.step for histogram in histograms] == steps
        assert histograms[0].histogram_value.num == 64  # two layers of full rank 32
    table = events.Tensors("rank_table/text_summary")[0].tensor_proto.string_val[0].decode()
    for layer in run[0].compression.layers:
        assert f"| {layer.name} | {layer.out_features} | {layer.in_features} | " in table
    tags = events.Tags()
    assert "custom_scalars__config__" in tags["tensors"]
    score = events.Scalars("hp/score_at_budget")[-1].value
    assert math.isfinite(score)


def test_history_and_flow_lie_in_the_run_folder(run: tuple[Any, Path]) -> None:
    task, folder = run
    told = json.loads((folder / "rank_history.json").read_text(encoding="utf-8"))
    assert told["budget"] == math.floor(0.4 * 16384)
    assert told["reached"] is True
    assert [entry["ranks"] for entry in told["history"]] == [entry.ranks for entry in task.strategy.state.history]
    assert (folder / "rank_flow.png").read_bytes().startswith(b"\x89PNG")


def test_other_strategies_leave_nothing(tiny_bert: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=[RankHistory()])
    trainer.fit(make_task(tiny_bert, SVD(keep_ratio=0.5)), datamodule=SyntheticData())
    assert not list(Path(str(trainer.log_dir)).glob("rank_*"))


def test_flow_counts_parameters_by_kind() -> None:
    shapes = {"h.0.up": LinearShape(8, 4), "h.1.up": LinearShape(8, 4), "h.0.down": LinearShape(4, 8)}
    plan = RankPlan(72, shapes, dict.fromkeys(shapes, 4))
    assert kept_by_kind(plan, {"h.0.up": 2, "h.1.up": 3, "h.0.down": 1}) == {"up": 60, "down": 12}
    elastic = RankPlan(72, shapes, dict.fromkeys(shapes, 4), cost=Cost(allow_dense=True))
    assert kept_by_kind(elastic, {"h.0.up": 2, "h.1.up": 4, "h.0.down": 1}) == {"up": 24 + 32, "down": 12}
    history = [Reallocation(5, 90.0, 72, {"h.0.up": 2, "h.1.up": 3, "h.0.down": 1})]
    left, right = flow_figure(plan, history, 9).axes
    assert list(left.lines[0].get_ydata()) == pytest.approx([144 / 96, 72 / 96, 72 / 96])
    assert list(left.lines[0].get_xdata()) == [0, 5, 9]
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["up", "down"]
