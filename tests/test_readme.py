"""README as a stranger follows it: its files are written, its commands and its Python are run as they stand."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from lowrank_pl.cli import main
from tests.support.tiny import save_tiny_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Commands of other programs: they install, or wait for a browser.
FOREIGN = ("pip", "bash", "tensorboard")
# A second instead of an hour; the last word on an option counts.
SHORTER = ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
SHORTER += ["--trainer.enable_model_summary", "false"]
FUNCTIONS = ("export", "evaluate", "benchmark")  # they have no trainer


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Every command of every bash block, in order, without comments."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    return [words for words in found if words and words[0] not in FOREIGN]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a user stands: the repository's configurations, a model and files under the names of README."""
    here = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "configs", here / "configs")
    save_tiny_model("bert", here / "roberta-base")
    for name, rows in (("train", 48), ("dev", 16), ("test", 16)):
        texts = [
            f"{'a good film' if row % 2 else 'an awful plot'} {'abcdefgh'[row % 8]},{row % 2}" for row in range(rows)
        ]
        (here / f"{name}.csv").write_text("\n".join(["sentence,stars", *texts]) + "\n", encoding="utf-8")
    (here / "new.csv").write_text("sentence\na good film\nan awful plot\n", encoding="utf-8")
    (mine,) = blocks("yaml")
    (here / "mine.yaml").write_text(mine, encoding="utf-8")
    return here


def test_commands_and_python_run_as_they_stand(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    found = commands()
    assert [words[1] for words in found] == ["fit", "inspect", "compress", "fit", "test", "export", "predict", "fit"]
    for words in found:
        assert words[0] == "lowrank-pl"
        main([*words[1:], *([] if words[1] in FUNCTIONS else SHORTER)])
        said = capsys.readouterr().out
        if words[1] == "predict":
            assert re.search(r"^predictions: +logs/runs/\w+/predictions\.jsonl$", said, re.MULTILINE)
        if words[1] in ("fit", "test"):
            assert re.search(r"^report: +logs/runs/\w+/report\.md$", said, re.MULTILINE)
    for path in ("compressed/model.ckpt", "logs/runs/tuned/report.json", "small/model.safetensors"):
        assert (folder / path).exists()
    python = blocks("python")
    assert len(python) == 4
    for code in python:
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert list(folder.glob("lightning_logs/version_0/report.json"))
    assert re.search(r"^0\.3\d of [\d,]+ weights kept$", capsys.readouterr().out, re.MULTILINE)
    assert (folder / "factorised" / "SHA256SUMS").exists()
