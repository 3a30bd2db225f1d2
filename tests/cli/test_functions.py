"""Verbs that are functions: which data `--config` and `--data` give them, and what is said of mistakes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from lowrank_pl.cli import functions
from lowrank_pl.data import GLUE, Docstrings

CONFIGS = Path(__file__).parents[2] / "configs"
RUN = """
trainer: {max_epochs: 3}
model: {class_path: SequenceClassification}
report: {}
ckpt_path: null
data:
  class_path: lowrank_pl.data.GLUE
  init_args: {tokenizer: elsewhere, task: SST-2, eval_batch_size: 5}
"""


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `export` is called with instead of being run."""
    found: dict[str, Any] = {}

    @functools.wraps(functions.FUNCTIONS["export"])
    def export(*args: Any, **options: Any) -> Path:
        found.update(options)
        return Path("out")

    monkeypatch.setitem(functions.FUNCTIONS, "export", export)
    return found


def run(*words: str) -> None:
    functions.run_function("export", ["--ckpt_path", "a.ckpt", "--output", "out", *words])


def test_the_configuration_of_a_run_gives_its_data_alone(given: dict[str, Any], tmp_path: Path, tiny_bert: str) -> None:
    (tmp_path / "run.yaml").write_text(RUN, encoding="utf-8")
    run("--config", str(tmp_path / "run.yaml"), "--data.init_args.eval_batch_size=7", "--max_drop", "0.1")
    data = given["data"](tiny_bert)
    assert type(data) is GLUE
    assert (data.tokenizer, data.task.name, data.eval_batch_size) == (tiny_bert, "SST-2", 7)
    assert (given["ckpt_path"], given["max_drop"]) == ("a.ckpt", 0.1)


@pytest.mark.parametrize("data", ["GLUE", "{class_path: GLUE}"])
def test_a_run_may_name_the_class_of_its_data_alone(
    given: dict[str, Any], tmp_path: Path, tiny_bert: str, data: str
) -> None:
    (tmp_path / "run.yaml").write_text(f"trainer: {{max_epochs: 3}}\ndata: {data}\n", encoding="utf-8")
    run("--config", str(tmp_path / "run.yaml"), "--data.init_args.task", "SST-2")
    assert given["data"](tiny_bert).task.name == "SST-2"


def test_later_data_replace_earlier_ones(given: dict[str, Any], tiny_bert: str) -> None:
    run(f"--config={CONFIGS / 'recipes' / 'glue_svd.yaml'}", "--config", str(CONFIGS / "data" / "docstrings.yaml"))
    data = given["data"](tiny_bert)
    assert type(data) is Docstrings
    assert data.max_length == 48


def test_other_configurations_are_those_of_the_verb(given: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "export.yaml").write_text("format: dense\noverwrite: true\n", encoding="utf-8")
    run("--config", str(tmp_path / "export.yaml"))
    assert (given["format"], given["overwrite"], given["data"]) == ("dense", True, None)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--data", "GLEU"), "--data 'GLEU' is no class that is known"),
        (("--data=GLUE", "--data.init_args.tsk=MRPC"), "--data has no argument 'tsk'"),
        (("--data=GLUE",), "--data: the following arguments are required: task"),
        (("--config", "nowhere.yaml"), "--config: File does not exist"),
    ],
)
def test_mistakes_end_in_a_sentence(words: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(*words)
    message = capsys.readouterr().err
    assert told in message
    assert len(message.splitlines()) == 2
