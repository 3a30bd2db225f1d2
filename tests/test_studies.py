"""Benchmarks and studies: each explains its options, and a grid whose runs are there only writes its table."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lowrank_pl.importance import LayerMoments
from tests.support.forks import Forks
from tests.support.tiny import tiny_tokenizer

ROOT = Path(__file__).parents[1]
PROGRAMS = sorted(
    path
    for folder in ("benchmarks", "studies")
    for path in (ROOT / folder).glob("*.py")
    if "__main__" in path.read_text()
)


def run(path: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """As `python PATH WORDS…`, in this process."""
    monkeypatch.syspath_prepend(str(path.parent))
    monkeypatch.setattr(sys, "argv", [str(path), *words])
    before = set(sys.modules)
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        # Modules beside a program are found by their bare names, which mean nothing to other tests.
        beside = {other.stem for other in path.parent.glob("*.py")}
        for name in beside & (set(sys.modules) - before):
            del sys.modules[name]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_every_program_explains_its_options(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(path, monkeypatch, "--help")
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert f"python {path.relative_to(ROOT)}" in said
    # Other programs in an example, such as pip, have options of their own.
    others = rf"^ +(pip|python (?!{re.escape(str(path.relative_to(ROOT)))})).*$"
    example = re.sub(others, "", said.split("options:")[0].split("\n\n", 1)[1], flags=re.MULTILINE)
    used = re.findall(r"--(\w+)", example)
    assert all(re.search(rf"^  --{name}\b", said, re.MULTILINE) for name in used), "an example that cannot be run"


def report(score: float) -> dict[str, Any]:
    return {
        "score": score,
        "score_dense": 0.8,
        "metrics": {"accuracy": score, "f1": None, "loss": 0.5, "collapsed": score < 0.6},
        "keep_ratio": 0.5,
        "parameters": {"total": 1234},
    }


def write_report(folder: Path, score: float) -> None:
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(report(score)))


GRID = ROOT / "studies" / "grid.py"


def test_a_grid_whose_runs_are_there_only_writes_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, score in ((0, 0.8), (1, 0.9)):
        runs = tmp_path / f"MRPC-{seed}"
        write_report(runs / "dense", 0.9)
        write_report(runs / "untuned-KroneckerSVD-without-refit-recalibrated-0.5", score - 0.3)
        write_report(runs / "one_round-RankDyna-0.5", score)
    write_report(tmp_path / "MRPC-0" / "tuned-KroneckerSVD-0.5", 0.81)
    words = ["--tasks", "MRPC", "--untuned", "KroneckerSVD without refit, recalibrated:0.5", "--seeds", "0", "1"]
    words += ["--one_round", "RankDyna:0.5", "--tuned", "KroneckerSVD:0.5:0", "--output", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        run(GRID, monkeypatch, "--glue", "nowhere", *words)
    assert stop.value.code == 0
    assert (tmp_path / "grid.md").read_text().splitlines()[2:] == [
        "|  | dense | 1 | 2 | 0.900 ± 0.000 (0.500) | 100.0% |",
        "| untuned | KroneckerSVD without refit, recalibrated | 0.5 | 2 | 0.550 ± 0.071 (0.500)† | 61.1% |",
        "| tuned | KroneckerSVD | 0.5 | 1 | 0.810 (0.500) | 90.0% |",
        "| one_round | RankDyna | 0.5 | 2 | 0.850 ± 0.071 (0.500) | 94.4% |",
    ]
    figures = json.loads((tmp_path / "grid.json").read_text())
    assert {entry["score"] for entry in figures if entry["method"] == "RankDyna"} == {0.8, 0.9}
    assert (tmp_path / "grid.png").stat().st_size > 1000


def test_a_table_is_written_of_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(tmp_path / "MRPC-0" / "dense", 0.9)
    words = ["--tasks", "MRPC", "STS-B", "--untuned", "SVD:0.5", "--output", str(tmp_path), "--table"]
    with pytest.raises(SystemExit):
        run(GRID, monkeypatch, "--glue", "nowhere", *words)
    told = (tmp_path / "grid.md").read_text().splitlines()[2:]
    assert told == ["|  | dense | 1 | 0 / 1 | 0.900 (0.500) |  |  |", "| untuned | SVD | 0.5 | 0 |  |  |  |"]


def test_alternatives_that_are_there_are_put_into_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for task, agreement in (("MRPC", "agreement"), ("STS-B", "correlation")):
        folder = tmp_path / f"{task}-0"
        for name, score in (("dense", 0.8), ("KroneckerSVD-0.2", 0.7)):
            write_report(folder / name, score)
            told = json.loads((folder / name / "report.json").read_text()) | {"seconds": 90.0}
            (folder / name / "report.json").write_text(json.dumps(told))
            for kind, size in (("float", 4_000_000), ("int8", 1_000_000)):
                written = folder / f"{kind}-{name}"
                written.mkdir()
                lost = 0.08 if kind == "int8" else 0.0
                scores = {"after": {"score": score - lost, "loss": 0.5}, agreement: 1.0 - lost}
                (written / "report.json").write_text(json.dumps({"export_scores": scores}))
                (written / "model.onnx").write_bytes(b"0" * size)
    path = ROOT / "studies" / "alternatives.py"
    words = ["--tasks", "MRPC", "STS-B", "--rows", "KroneckerSVD 0.2", "--output", str(tmp_path), "--table"]
    with pytest.raises(SystemExit) as stop:
        run(path, monkeypatch, "--glue", "nowhere", *words)
    assert stop.value.code == 0
    lines = [line.strip("| ").split(" | ") for line in (tmp_path / "alternatives.md").read_text().splitlines()]
    assert [line[:7] for line in lines[2:]] == [
        ["dense", "4.0", "0.800 (0.500)", "0.800 (0.500)", "100.0%", "1.000", "0.0"],
        ["dense, int8", "1.0", "0.720 (0.500)", "0.720 (0.500)", "90.0%", "0.920", "0.0"],
        ["KroneckerSVD 0.2", "4.0", "0.700 (0.500)", "0.700 (0.500)", "87.5%", "1.000", "1.5"],
        ["KroneckerSVD 0.2, int8", "1.0", "0.620 (0.500)", "0.620 (0.500)", "77.5%", "0.920", "1.5"],
    ]
    assert (tmp_path / "alternatives_size.png").stat().st_size > 1000


@pytest.mark.parametrize("word", ["SVD", "nothing:0.5", "SVD:0.5:0:1"])
def test_words_that_name_no_cell_end_a_grid(word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="wanted METHOD:RATIOS or METHOD:RATIOS:SEEDS"):
        run(GRID, monkeypatch, "--glue", "nowhere", "--untuned", word, "--output", str(tmp_path))


# Spawned workers would import everything anew.
FORKING = """
import multiprocessing, runpy, sys
forking = multiprocessing.get_context("fork")
multiprocessing.get_context = lambda method: forking
sys.argv = sys.argv[1:]
sys.path.insert(0, {folder!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_grid_does_what_is_missing_and_goes_on_after_a_failure(
    everything_loaded: Forks, tiny_bert: str, tmp_path: Path
) -> None:
    """As a user runs it: two processes, tasks from a file, and one run that cannot work."""
    rows = "text,label\n" + "".join(f"the w{i % 7} is w{i % 5},{'ab'[i % 2]}\n" for i in range(32))
    (tmp_path / "train.csv").write_text(rows)
    data = {"train": str(tmp_path / "train.csv"), "validation": str(tmp_path / "train.csv"), "batch_size": 8}
    task = tmp_path / "letters.yaml"
    task.write_text(json.dumps({"data": {"class_path": "TextFiles", "init_args": {**data, "max_length": 16}}}))
    command = [
        "-c",
        FORKING.format(folder=str(GRID.parent)),
        str(GRID),
        "--glue",
        "nowhere",
        "--tasks",
        str(task),
        "--pretrained",
        tiny_bert,
    ]
    command += ["--epochs", "1", "--untuned", "KroneckerSVD:0.5,0.000001", "--tuned", "SVD:0.5", "--workers", "2"]
    command += ["--threads", "1", "--output", str(tmp_path / "out")]
    said = everything_loaded.run(command, ROOT, expected=1)
    out = tmp_path / "out" / "letters-0"
    assert f"failed: {out / 'untuned-KroneckerSVD-0.000001'}; see" in said
    assert "BudgetError" in (out / "untuned-KroneckerSVD-0.000001.log").read_text()
    reports = {path.parent.name for path in out.glob("*/report.json")}
    assert reports == {"dense", "tuned-SVD-0.5", "untuned-KroneckerSVD-0.5"}
    assert {path.parents[1].name for path in out.rglob("*.ckpt")} == {"dense"}
    times = {path: path.stat().st_mtime_ns for path in out.glob("[tu]*/report.json")}
    score = json.loads((out / "dense" / "report.json").read_text())["score"]
    (out / "dense" / "report.json").unlink()  # as if it had been killed after its epoch
    everything_loaded.run(command, ROOT, expected=1)
    assert {path: path.stat().st_mtime_ns for path in out.glob("[tu]*/report.json")} == times
    assert "Restored all states" in (out / "dense.log").read_text()
    assert json.loads((out / "dense" / "report.json").read_text())["score"] == score


def test_a_run_whose_checkpoint_is_gone_is_named_where_another_starts_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "studies"))
    program = runpy.run_path(str(ROOT / "studies" / "runs.py"))
    first = program["Run"](tmp_path / "first", ())
    second = program["Run"](tmp_path / "second", (), first)
    write_report(first.folder, 0.9)
    with pytest.raises(SystemExit, match=rf"remove their folders, and they are done again: {first.folder}$"):
        program["run_all"]([second], 1, None)
    assert first.report is not None
    write_report(second.folder, 0.9)
    assert program["run_all"]([first, second], 1, None) == []


def test_what_waits_for_a_run_that_failed_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "studies"))
    program = runpy.run_path(str(ROOT / "studies" / "runs.py"))
    scope = program["run_all"].__globals__
    monkeypatch.setitem(scope, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    done = []

    def execute(run: Any) -> int:
        done.append(run.folder.name)
        return int(run.folder.name == "first")

    monkeypatch.setitem(scope, "_execute", execute)
    first = program["Run"](tmp_path / "first", ())
    second = program["Run"](tmp_path / "second", (), first)
    third = program["Run"](tmp_path / "third", (), second)
    other = program["Run"](tmp_path / "other", ())
    assert program["run_all"]([third, other], 1, None) == [first, second, third]
    assert done == ["first", "other"]


def test_the_script_for_gpus_says_at_once_that_there_is_none() -> None:
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh")]
    environment = {**os.environ, "PYTHON": "false"}  # an interpreter that finds no device, without loading torch
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 1
    assert result.stderr == "gpu.sh: false finds no torch with a CUDA device, which everything here needs.\n"
    assert not result.stdout


def test_one_right_factor_for_several_layers_costs_nothing_where_they_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "studies"))
    program = runpy.run_path(str(ROOT / "studies" / "shared_factor.py"))
    generator = torch.Generator().manual_seed(0)

    def moments(size: int) -> torch.Tensor:
        root = torch.randn(size, size, generator=generator)
        return root @ root.mT

    inputs, outputs = moments(8), moments(6)
    one, other = (torch.randn(6, 8, generator=generator) for _ in range(2))

    def ratio(weights: tuple[torch.Tensor, torch.Tensor]) -> float:
        layers = {name: torch.nn.Linear(8, 6) for name in ("block.query", "block.key", "other.key")}
        for layer, weight in zip(layers.values(), (*weights, other), strict=True):
            layer.weight.data.copy_(weight)
        measured = {name: LayerMoments(inputs, outputs) for name in layers}
        assert program["inputs_in_common"](measured) == [["block.query", "block.key"]]
        (row,) = program["study"](layers, measured, [0.6])[0.6]
        return float(row["ratio"])

    assert ratio((one, one)) < 1 < ratio((one, other))


def test_a_task_of_word_order_exchanges_words_and_changes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [chr(ord("a") + i) for i in range(20)]
    texts = [" ".join(words[i:j]) for i in range(20) for j in range(i + 3, 21)]
    (tmp_path / "SST-2").mkdir()
    rows = "\n".join(f"{text}\t1" for text in ["x y z u v w", "y z u v w", *texts])
    (tmp_path / "SST-2" / "train.tsv").write_text(f"sentence\tlabel\n{rows}\n")
    words_given = ("--glue", str(tmp_path), "--samples", "5", "2")
    for name in ("one", "two"):
        run(ROOT / "studies" / "word_order.py", monkeypatch, *words_given, "--output", str(tmp_path / name))
    with pytest.raises(SystemExit):
        run(ROOT / "studies" / "word_order.py", monkeypatch, "--glue", str(tmp_path), "--output", str(tmp_path / "no"))
    assert "SST-2 has 7 sentences of 5 to 15 words" in capsys.readouterr().err  # neither parts nor longer ones
    assert not (tmp_path / "no").exists()
    made = {name: (tmp_path / "one" / f"{name}.csv").read_text() for name in ("train", "dev")}
    assert made == {name: (tmp_path / "two" / f"{name}.csv").read_text() for name in made}
    lines = [line for text in made.values() for line in text.splitlines()[1:]]
    given = {"x y z u v w", *texts}
    assert len(lines) == 7
    assert {label for _, label in (line.split(",") for line in lines)} == {"ok", "odd"}
    for text, label in (line.split(",") for line in lines):
        assert (text in given) == (label == "ok")
        assert any(sorted(text.split()) == sorted(other.split()) for other in given)


def test_static_embeddings_learn_which_word_is_there(
    tiny_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "packages" / "wordllama"
    for folder in ("weights", "tokenizers"):
        (package / folder).mkdir(parents=True)
    tokenizer = tiny_tokenizer()
    table = torch.randn(len(tokenizer), 256, generator=torch.Generator().manual_seed(0))
    save_file({"table": table}, package / "weights" / "l2_supercat_256.safetensors")
    tokenizer.backend_tokenizer.save(str(package / "tokenizers" / "l2_supercat_tokenizer_config.json"))
    words = ("good", "bad")
    rows = "text,label\n" + "".join(f"the film {'is' if i % 3 else 'was'} {words[i % 2]},{i % 2}\n" for i in range(32))
    (tmp_path / "rows.csv").write_text(rows)
    data = {"train": str(tmp_path / "rows.csv"), "validation": str(tmp_path / "rows.csv")}
    task = tmp_path / "words.yaml"
    task.write_text(json.dumps({"data": {"class_path": "TextFiles", "init_args": data}}))
    given = ["--glue", "nowhere", "--tasks", str(task), "--packages", str(package.parent), "--pretrained", tiny_bert]
    path = ROOT / "studies" / "static_embeddings.py"
    run(path, monkeypatch, *given, "--rates", "1e-3", "5e-3", "--output", str(tmp_path / "out"))
    found = json.loads((tmp_path / "out" / "static_embeddings.json").read_text())
    assert [(row["width"], row["tuned"]) for row in found] == [
        (256, "head"),
        (256, "table and head"),
        (64, "head"),
        (64, "table and head"),
    ]
    assert all(row["metrics"]["score"] == row["metrics_int8"]["score"] == 1 for row in found)
    assert found[0]["megabytes"] == (2 * table.numel() + 4 * (2 * 256 + 2)) / 1e6


def test_perplexities_that_are_there_are_put_into_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, score in (("SVD-0.8", 3.1e7), ("whitening-sequential-0.8", 48.0)):
        (tmp_path / name).mkdir()
        told = report(score) | {"score_dense": 24.0, "seconds": 90.0}
        (tmp_path / name / "report.json").write_text(json.dumps(told))
    path = ROOT / "studies" / "decoders.py"
    words = [
        "--model",
        "m",
        "--train",
        "a.txt",
        "--test",
        "b.txt",
        "--ratios",
        "0.8",
        "--output",
        str(tmp_path),
        "--table",
    ]
    with pytest.raises(SystemExit) as stop:
        run(path, monkeypatch, *words)
    assert stop.value.code == 0
    assert (tmp_path / "decoders.md").read_text().splitlines()[2:] == [
        "|  | dense | 24.00 | 1.00 | 1.000 |  |",
        "| 0.8 | SVD | 3.10e+07 | 1.29e+06 | 0.500 | 2 |",
        "| 0.8 | whitening, sequential | 48.00 | 2.00 | 0.500 | 2 |",
    ]
    assert (tmp_path / "decoders.png").stat().st_size > 1000
    for name, score, window in (("dense", 25.0, 512), ("dense", 20.0, 1024), ("SVD-0.8", 50.0, 512)):
        folder = tmp_path / f"{name}-whole-{window}"
        folder.mkdir()
        told = {"score": score, "metrics": {"window": float(window)}}
        (folder / "report.json").write_text(json.dumps(told))
    with pytest.raises(SystemExit) as stop:
        run(path, monkeypatch, *words, "--whole", "bf16-mixed", "--lengths", "512", "1024")
    assert stop.value.code == 0
    assert (tmp_path / "decoders.md").read_text().splitlines()[2:] == [
        "|  | dense | 24.00 | 1.00 | 1.000 |  | 25.00 | 20.00 |",
        "| 0.8 | SVD | 3.10e+07 | 1.29e+06 | 0.500 | 2 | 50.00 (2.00) |  |",
        "| 0.8 | whitening, sequential | 48.00 | 2.00 | 0.500 | 2 |  |  |",
    ]
    for name, score in (("dense", 12.0), ("SVD-0.8", 15.0), ("dense whole", 10.0)):
        folder = tmp_path / f"{name.split()[0]}-tuned-300-1e-4{'-whole-512' if 'whole' in name else ''}"
        folder.mkdir()
        steps = 280 if name == "dense" else 300
        told = {"score": score, "metrics": {"window": 512.0}, "steps": steps}
        (folder / "report.json").write_text(json.dumps(told))
    with pytest.raises(SystemExit) as stop:
        run(path, monkeypatch, *words, "--whole", "bf16-mixed", "--steps", "300")
    assert stop.value.code == 0
    assert (tmp_path / "decoders.md").read_text().splitlines()[2:] == [
        "|  | dense | 24.00 | 1.00 | 1.000 |  | 25.00 | 12.00 | 10.00 |",
        "| 0.8 | SVD | 3.10e+07 | 1.29e+06 | 0.500 | 2 | 50.00 (2.00) | 15.00 (1.25) |  |",
        "| 0.8 | whitening, sequential | 48.00 | 2.00 | 0.500 | 2 |  |  |  |",
        "",
        "Tuned for fewer steps, as --train has no more windows: dense 1 for 280.",
    ]
