"""The command line in two processes over gloo, with the callbacks, logger and checkpoints that every run has."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.test_entry import NOISE
from tests.support import verbs_in_two_processes
from tests.support.forks import Forks
from tests.support.tiny import save_tiny_decoder, save_tiny_model
from tests.support.verbs_in_two_processes import COMPRESSING, CONFIGS, EVALUATED, RESUMED, TRAINING

ROOT = Path(__file__).parents[1]
SCRIPT = Path(__file__).parent / "support" / "verbs_in_two_processes.py"
TIMEOUT = 1800  # on a machine that is busy with other things; alone it takes a minute
TEST_ROWS = 7  # which two processes cannot halve
DDP = ["--config", str(CONFIGS / "trainer" / "ddp.yaml")]


def write_table(path: Path, rows: int, seed: int) -> Path:
    """Sentences with a label that can be learned."""
    chance = random.Random(seed)
    lines = ["text,label"]
    for index in range(rows):
        word = chance.choice(["good", "great"] if index % 2 else ["bad", "awful"])
        lines.append(f"a {word} film {' '.join(chance.choices('abcdefgh', k=chance.randint(1, 5)))},{index % 2}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of two steps an epoch on a tiny model and table."""
    folder = tmp_path_factory.mktemp("inputs")
    tables = {
        name: write_table(folder / f"{name}.csv", rows, rows)
        for name, rows in (("train", 32), ("validation", 9), ("test", TEST_ROWS))
    }
    save_tiny_decoder("llama", folder / "decoder")
    words = ["the", "film", "is", "good"]
    (folder / "text.txt").write_text(" ".join(f"{words[at * at % 4]} {at % 10}" for at in range(53)))
    return [
        f"--model.init_args.pretrained={save_tiny_model('bert', folder / 'bert')}",
        "--data=TextFiles",
        *(f"--data.init_args.{name}={path}" for name, path in tables.items()),
        "--data.init_args.batch_size=8",
        "--data.init_args.eval_batch_size=2",
        "--trainer.accelerator=cpu",
        "--trainer.max_epochs=1",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
    ]


def variables(folder: Path) -> dict[str, str]:
    """A folder without the user's cache."""
    own = {"LOWRANK_PL_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own}


Runs = dict[int, Path]


@pytest.fixture(scope="module")
def runs(everything_loaded: Forks, common: list[str], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Every verb in two processes; what these are compared with is run by this one."""
    folders = {devices: tmp_path_factory.mktemp(f"devices-{devices}") for devices in (1, 2)}
    words = {
        devices: [*common, f"--trainer.logger.init_args.save_dir={folders[devices] / 'logs'}"] for devices in folders
    }
    script = [str(SCRIPT), str(folders[2]), "2", *DDP, *words[2]]
    everything_loaded.run(script, folders[2], variables(folders[2]), processes=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWRANK_PL_CACHE", str(folders[1] / "cache"))
        verbs_in_two_processes.run(folders[1], ["--trainer.devices=1", *words[1]], 1)
    return folders


def found(runs: Runs) -> list[dict[str, Any]]:
    """What each of the two processes saw."""
    return [torch.load(runs[2] / f"found-{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("strategy", TRAINING)
def test_both_processes_end_a_run_with_the_same_weights(strategy: str, runs: Runs) -> None:
    first, second = found(runs)
    for verb in ("fit", "resume") if strategy in RESUMED else ("fit",):
        mine, other = (process[f"{strategy}-{verb} fit"] for process in (first, second))
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in mine)
    if strategy in EVALUATED:
        assert first[f"{strategy}-test test"] == second[f"{strategy}-test test"]


@pytest.mark.parametrize("strategy", TRAINING)
def test_every_verb_leaves_what_it_leaves_in_one_process(strategy: str, runs: Runs) -> None:
    always = {"config.yaml", "events.out", "hparams.yaml"}
    reports = {"report.json", "report.md"} | (set() if strategy == "none" else {"ranks.png"})
    flow = {"rank_history.json", "rank_flow.png"} if strategy == "rankdyna" else set()
    left = {"fit": reports | flow | {"checkpoints"}}
    if strategy in RESUMED:
        left["resume"] = left["fit"]
    if strategy in EVALUATED:
        left |= {"test": reports, "predict": {"predictions"}}
    for verb, files in left.items():
        assert names(runs[2] / "logs" / "runs" / f"{strategy}-{verb}") == always | files, verb
    for verb, epochs in (("fit", 1), *([("resume", 2)] if strategy in RESUMED else [])):
        folder = runs[2] / "logs" / "runs" / f"{strategy}-{verb}"
        report = json.loads((folder / "report.json").read_text())
        assert (report["verb"], report["epochs"], report["steps"]) == ("fit", epochs, 2 * epochs)
        assert {"best.ckpt", "last.ckpt"} <= {path.name for path in (folder / "checkpoints").iterdir()}
        if strategy == "rankdyna":
            assert json.loads((folder / "rank_history.json").read_text())["reached"] is True
            assert report["keep_ratio"] <= 0.33


def names(folder: Path) -> set[str]:
    """Files of a run, with the event files and the processes' predictions as one each."""
    found = {path.name.split(".tfevents")[0] for path in folder.iterdir()}
    return {"predictions" if name.startswith("predictions") else name for name in found}


@pytest.mark.parametrize("strategy", EVALUATED)
def test_no_sample_is_scored_or_predicted_twice(strategy: str, runs: Runs) -> None:
    folder = runs[2] / "logs" / "runs" / f"{strategy}-predict"
    rows = [
        json.loads(line)
        for rank in (0, 1)
        for line in (folder / f"predictions-{rank}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert sorted(row["index"] for row in rows) == list(range(TEST_ROWS))
    labels = [str(index % 2) for index in range(TEST_ROWS)]
    hits = sum(str(row["prediction"]) == labels[row["index"]] for row in rows)
    report = json.loads((runs[2] / "logs" / "runs" / f"{strategy}-test" / "report.json").read_text())
    assert report["metrics"]["accuracy"] == pytest.approx(hits / TEST_ROWS, abs=1e-6)


@pytest.mark.parametrize("strategy", COMPRESSING)
def test_compressing_gives_the_factors_of_one_process(strategy: str, runs: Runs) -> None:
    """Each process has factorised its share of the layers; only the order of the sum over the data differs."""
    one, two = (
        torch.load(runs[devices] / f"{strategy}-compressed" / "model.ckpt", weights_only=True)["state_dict"]
        for devices in (1, 2)
    )
    assert one.keys() == two.keys()
    if strategy == "svd":
        assert all(torch.equal(one[name], two[name]) for name in one)
    if strategy == "fwsvd":
        lefts = [name for name in one if name.endswith(".left.weight")]
        assert lefts
        for name in lefts:
            right = name.replace(".left.", ".right.")
            torch.testing.assert_close(two[name] @ two[right], one[name] @ one[right], atol=1e-4, rtol=0)
    told = [json.loads((runs[d] / f"{strategy}-compressed" / "report.json").read_text()) for d in (1, 2)]
    assert [layer["name"] for layer in told[0]["layers"]] == [layer["name"] for layer in told[1]["layers"]]
    # Behind layers of a few ranks some inputs are always zero up to rounding: there the plain error says nothing.
    error, least = ("weighted_error", 2e-3) if strategy == "sequential" else ("error", 0.0)
    for mine, other in zip(told[0]["layers"], told[1]["layers"], strict=True):
        assert mine["rank"] == other["rank"]
        assert mine[error] == pytest.approx(other[error], rel=1e-3, abs=least)
    for key in ("score_dense", "score"):
        assert told[0][key] == pytest.approx(told[1][key], abs=1e-6)
    first, second = found(runs)
    mine, other = (process[f"{strategy}-compress validate"] for process in (first, second))
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    assert (runs[2] / f"{strategy}-compressed" / "ranks.png").exists()


def test_diagnosing_finds_what_one_process_finds(runs: Runs) -> None:
    one, two = (json.loads((runs[devices] / "diagnosis" / "diagnosis.json").read_text()) for devices in (1, 2))
    assert [layer["name"] for layer in one["layers"]] == [layer["name"] for layer in two["layers"]]
    for mine, other in zip(one["layers"], two["layers"], strict=True):
        assert mine["objective"]["SVD"] == pytest.approx(other["objective"]["SVD"], rel=1e-3)
    assert (runs[2] / "diagnosis" / "diagnosis.png").exists()


def test_a_perplexity_is_that_of_one_process(runs: Runs) -> None:
    one, two = (
        json.loads((runs[devices] / "logs" / "runs" / "decoder" / "report.json").read_text())["metrics"]
        for devices in (1, 2)
    )
    assert (one["tokens"], one["window"]) == (two["tokens"], two["window"]) == (106 - 7, 16)
    for name in ("perplexity", "loss"):
        assert two[name] == pytest.approx(one[name], rel=1e-6)


def test_no_warning_asks_to_reduce_what_is_reduced(runs: Runs) -> None:
    for rank in (0, 1):
        assert json.loads((runs[2] / f"warnings-{rank}.json").read_text()) == []


def test_the_program_itself_ends_well_and_claims_a_free_folder(common: list[str], tmp_path: Path) -> None:
    """`python -m lowrank_pl` in two processes, beside the folder of an earlier run."""
    (tmp_path / "logs" / "runs" / "version_0").mkdir(parents=True)
    recipe = ["--config", str(CONFIGS / "recipes" / "glue_rankdyna.yaml")]
    result = subprocess.run(
        [sys.executable, "-m", "lowrank_pl", "fit", *recipe, *DDP, *common],
        cwd=tmp_path,
        env=variables(tmp_path),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    for noise in NOISE:
        assert noise not in result.stdout + result.stderr
    folder = tmp_path / "logs" / "runs" / "version_1"
    assert {"report.json", "ranks.png", "rank_history.json", "config.yaml", "checkpoints"} <= names(folder)
    assert {path.name for path in folder.parent.iterdir()} == {"version_0", "version_1"}
    assert {path.name for path in tmp_path.iterdir()} <= {"logs", "cache"}


def test_a_failure_of_one_process_ends_both(runs: Runs) -> None:
    first, second = (process["failure"] for process in found(runs))
    assert second.startswith("NonFiniteError: a weight of the second process")
    assert first.startswith(f"ProcessFailedError: process 1 of this run has failed: {second.rstrip('.')}")
    assert not (runs[2] / "failed").exists()
