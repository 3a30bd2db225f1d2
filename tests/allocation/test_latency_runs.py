"""A budget in measured time, from a YAML file to what a run leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lowrank_pl.cli import main
from lowrank_pl.errors.run import ResumeMismatchError
from lowrank_pl.export import export
from tests.support.tables import write_sst2

RECIPE = Path(__file__).parents[2] / "configs" / "recipes" / "glue_finetune.yaml"


def write_table(path: Path, square: int = 320) -> Path:
    """Where up and down projections are cheap at any rank, so that ranks are others than by parameters."""
    times = {(32, 32): [10, square], (64, 32): [10, 72], (32, 64): [10, 72]}
    shapes = [
        {"out": m, "in": n, "dense_nanoseconds": 100, "ranks": [1, 32], "nanoseconds": found}
        for (m, n), found in times.items()
    ]
    path.write_text(json.dumps({"version": 1, "shapes": shapes}), encoding="utf-8")
    return path


@pytest.fixture
def words(tiny_bert: str, tmp_path: Path) -> list[str]:
    """A run of seconds, all but the strategy."""
    table = {"task": "SST-2", "path": str(write_sst2(tmp_path / "SST-2")), "batch_size": 8}
    logger = {"save_dir": str(tmp_path / "logs")}
    run = {
        "model": {"init_args": {"pretrained": tiny_bert}},
        "data": {"init_args": table},
        "trainer": {"accelerator": "cpu", "max_epochs": 1, "enable_progress_bar": False},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
    return [
        "--config",
        str(RECIPE),
        "--config",
        str(tmp_path / "run.yaml"),
        "--trainer.logger.init_args.save_dir",
        logger["save_dir"],
    ]


def strategy(path: Path, name: str, table: Path, **options: Any) -> list[str]:
    cost = {"class_path": "Latency", "init_args": {"table": str(table)}}
    chosen = {"class_path": name, "init_args": {"keep_ratio": 0.5, "cost": cost, **options}}
    path.write_text(yaml.safe_dump({"model": {"init_args": {"strategy": chosen}}}), encoding="utf-8")
    return ["--config", str(path)]


def budget(report: dict[str, Any]) -> None:
    """In time it is kept, and told beside the share of parameters, which is another."""
    cost = report["cost"]
    assert (cost["unit"], cost["dense"]) == ("ns", 1200)
    assert 0 < cost["kept"] <= 600
    assert cost["ratio"] == cost["kept"] / 1200
    parameters = report["parameters"]
    assert report["keep_ratio"] == parameters["targeted_kept"] / parameters["targeted_dense"]
    assert abs(report["keep_ratio"] - cost["ratio"]) > 0.01
    assert len(report["options"]["cost"]["digest"]) == 64


def test_compress_keeps_to_a_budget_in_time(words: list[str], tmp_path: Path) -> None:
    chosen = strategy(tmp_path / "strategy.yaml", "SVD", write_table(tmp_path / "latency.json"))
    main(["compress", *words, *chosen, f"--output={tmp_path / 'small'}"])
    report = json.loads((tmp_path / "small" / "report.json").read_text())
    budget(report)
    # 10 + 10 (r - 1) <= 50 and 10 + 2 (r - 1) <= 50
    assert {(row["out"], row["in"]): row["rank"] for row in report["layers"]} == {
        (32, 32): 5,
        (64, 32): 21,
        (32, 64): 21,
    }
    told = (tmp_path / "small" / "report.md").read_text()
    assert f"cost: {report['cost']['kept']:,} of 1,200 ns kept, keep_ratio {report['cost']['ratio']:.4f}" in told
    assert f"parameters kept, a share of {report['keep_ratio']:.4f}" in told
    export(str(tmp_path / "small"), str(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"of 1,200 ns kept, keep_ratio {report['cost']['ratio']:.4f}" in card


def test_rankdyna_keeps_to_a_budget_in_time_and_resumes_with_its_table_alone(words: list[str], tmp_path: Path) -> None:
    table = write_table(tmp_path / "latency.json")
    chosen = strategy(tmp_path / "strategy.yaml", "RankDyna", table)
    main(["fit", *words, *chosen])
    run = tmp_path / "logs" / "runs" / "version_0"
    report = json.loads((run / "report.json").read_text())
    budget(report)
    last = str(run / "checkpoints" / "last.ckpt")
    # The same budget of 600 ns from other times.
    other = write_table(tmp_path / "other.json", square=330)
    changed = strategy(tmp_path / "other.yaml", "RankDyna", other)
    longer = ["--trainer.max_epochs=2", "--ckpt_path", last]
    with pytest.raises(
        ResumeMismatchError, match=r"Latency with a table of digest .* there, by Latency with a table of"
    ):
        main(["fit", *words, *changed, *longer])
    moved = write_table(tmp_path / "moved.json")
    main(["fit", *words, *strategy(tmp_path / "moved.yaml", "RankDyna", moved), *longer])
