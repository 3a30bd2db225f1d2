"""How a program of the shell ends: exit codes, and one line for what a user can mend."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank_pl import __version__
from lowrank_pl.cli import console, main
from lowrank_pl.errors.arguments import ConstructionError, InterpolationError
from lowrank_pl.errors.optimizer import OptimizerArgumentsError
from lowrank_pl.errors.pretrained import UnsupportedModelError
from tests.support.forks import Forks
from tests.support.tables import write_sst2

NOISE = ("💡", "LeafSpec", "many workers", "Loading weights", "model shards", "dirpath has changed")
RECIPE = Path(__file__).parents[2] / "configs" / "recipes" / "glue_finetune.yaml"


@pytest.fixture
def arguments(tmp_path: Path, tiny_bert: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    data = ["--data.init_args.task=SST-2", f"--data.init_args.path={write_sst2(tmp_path / 'SST-2')}"]
    quick = ["--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false"]
    return [f"--model.init_args.pretrained={tiny_bert}", *data, *quick]


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for word, told in (("--version", f"lowrank-pl {__version__}\n"), ("--help", "  export ")):
        with pytest.raises(SystemExit) as stop:
            main([word])
        assert not stop.value.code
        assert told in capsys.readouterr().out
    for words in ([], ["fti"]):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2


@pytest.mark.parametrize(
    ("further", "error", "told"),
    [
        ("--model.init_args.optimizer.init_args.lr=-1", OptimizerArgumentsError, "Invalid learning rate: -1.0"),
        ("--trainer.logger=WandbLogger", ConstructionError, "WandbLogger cannot be made.*wandb.*Install the package"),
        ("--trainer.accelerator=cdu", ConstructionError, "invalid accelerator name"),
        ("--model.init_args.pretrained=${HOME}/model", InterpolationError, r"contains \$\{HOME\}"),
        ("--data.init_args.path=${DATA}", InterpolationError, "data.init_args.path"),
        ("--model.init_args.pretrained=picture", UnsupportedModelError, "'vit', which does not read text"),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    further: str,
    error: type[Exception],
    told: str,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "picture").mkdir()
    (tmp_path / "picture" / "config.json").write_text('{"model_type": "vit", "architectures": ["ViTModel"]}')
    monkeypatch.setattr(sys, "argv", ["lowrank-pl", "fit", "--config", str(RECIPE), *arguments, further])
    with pytest.raises(SystemExit) as stop:
        console()
    assert re.fullmatch(f"{error.__name__}: .*{told}.*", str(stop.value.code))


def test_debugging_shows_the_error_itself(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["fit", "--config", str(RECIPE), *arguments, "--data.init_args.path=${DATA}"]
    with pytest.raises(InterpolationError):
        main(words)
    monkeypatch.setattr(sys, "argv", ["lowrank-pl", *words])
    monkeypatch.setenv("LOWRANK_PL_DEBUG", "1")
    with pytest.raises(InterpolationError):
        console()


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(args: object = None) -> None:
        raise AttributeError("a bug")

    monkeypatch.setattr("lowrank_pl.cli.entry.main", broken)
    with pytest.raises(AttributeError, match="a bug"):
        console()


def test_an_interrupt_while_starting() -> None:
    command = [sys.executable, "-m", "lowrank_pl", "fit", "--config", str(RECIPE)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONVERBOSE": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    for line in process.stderr:  # until the heavy packages are being loaded
        if "import 'torch" in line:
            break
    process.send_signal(signal.SIGINT)
    said = process.stderr.read()
    assert process.wait() == 130
    assert "interrupted\n" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("name", ["glue_finetune", "glue_rankdyna"])  # other methods: test_lightning_features.py
def test_recipes_run_without_a_logger(
    name: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("mine: 1\n")
    main(["fit", "--config", str(RECIPE.with_name(f"{name}.yaml")), *arguments, "--trainer.logger=false"])
    said = capsys.readouterr().out
    # There is no folder of the run, and the working folder is not the run's to fill.
    assert "report" not in said
    assert "best:       checkpoints/best.ckpt (val/score" in said
    assert (tmp_path / "config.yaml").read_text() == "mine: 1\n"
    assert not (tmp_path / "report.md").exists()


def test_the_console_tells_nothing_that_nobody_can_act_on(
    everything_loaded: Forks, arguments: list[str], tmp_path: Path
) -> None:
    words = ["--config", str(RECIPE), *arguments]
    best = "logs/runs/version_0/checkpoints/best.ckpt"
    verbs = [["fit", *words], ["predict", *words, f"--ckpt_path={best}"]]
    # A new process, as warnings and messages come once. While packages are loaded: tests/test_two_processes.py.
    code = "import sys\nfrom lowrank_pl.cli import console\n"
    code += f"for words in {verbs!r}:\n    sys.argv[1:] = words\n    console()"
    said = everything_loaded.run(["-c", code], tmp_path)
    for noise in NOISE:
        assert noise not in said
    assert "predictions: logs/runs/version_1/predictions.jsonl" in said
