"""The command line: every configuration parses, every recipe runs, bad input ends in its message."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lowrank_pl.allocation import LayerOverride
from lowrank_pl.cli import console, main
from lowrank_pl.core.elementwise import ALS, EM, SGD, Adam, AdamSGD, PreconditionedLBFGS
from lowrank_pl.data import GLUE, CausalText, CoNLL, Docstrings, TextCorpus, TextFiles
from lowrank_pl.errors.arguments import MissingArgumentError
from lowrank_pl.errors.checkpoint import NotACheckpointError
from lowrank_pl.errors.outputs import OutputExistsError
from lowrank_pl.errors.pretrained import ModelFolderError
from lowrank_pl.errors.run import StrategyPlacementError
from lowrank_pl.strategies import FWSVD, SVD, TFWSVD, Calibration, NoCompression
from lowrank_pl.surgery import TargetSelector
from lowrank_pl.tasks import CausalLM, MaskedLM, SequenceClassification, TokenClassification
from tests.support.tables import write_sst2
from tests.support.tiny import save_tiny_decoder, save_tiny_model

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
RECIPES = sorted((CONFIGS / "recipes").glob("*.yaml"))
COMPLETE = [*RECIPES, CONFIGS / "quickstart.yaml"]
OVERLAYS = sorted(set(CONFIGS.rglob("*.yaml")) - set(COMPLETE))
BASE = CONFIGS / "recipes" / "glue_finetune.yaml"
VERBS = ("fit", "validate", "test", "predict", "compress", "diagnose", "inspect")


def ident(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


@pytest.fixture
def arguments(tmp_path: Path, tiny_bert: str) -> list[str]:
    """What turns a GLUE recipe into a run of seconds."""
    return [
        f"--model.init_args.pretrained={tiny_bert}",
        "--data.init_args.task=SST-2",
        f"--data.init_args.path={write_sst2(tmp_path / 'SST-2')}",
        "--trainer.accelerator=cpu",
        "--trainer.max_epochs=1",
        "--trainer.enable_progress_bar=false",
        f"--trainer.logger.init_args.save_dir={tmp_path / 'logs'}",
    ]


def run_folder(tmp_path: Path, version: int = 0) -> Path:
    return tmp_path / "logs" / "runs" / f"version_{version}"


def printed_config(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    with pytest.raises(SystemExit) as stop:
        main([*args, "--print_config"])
    assert stop.value.code == 0
    config: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return config


@pytest.mark.parametrize("path", COMPLETE, ids=ident)
def test_complete_configurations_parse(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = yaml.safe_load(path.read_text())
    config = printed_config(capsys, "fit", "--config", str(path))
    assert config["model"]["class_path"].endswith(f".{own['model']['class_path']}")
    strategy = own["model"]["init_args"]["strategy"]["class_path"]
    assert config["model"]["init_args"]["strategy"]["class_path"].endswith(f".{strategy}")


@pytest.mark.parametrize("path", OVERLAYS, ids=ident)
def test_overlays_parse_on_top_of_a_recipe(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = yaml.safe_load(path.read_text())
    config = printed_config(capsys, "fit", "--config", str(BASE), "--config", str(path))
    for section, given in own.items():
        for key, value in given.items():
            if isinstance(value, dict) and "init_args" in value:  # the others are the class's own defaults
                assert config[section][key]["class_path"] == value["class_path"]
                assert value["init_args"].items() <= config[section][key]["init_args"].items()
            elif key in ("max_epochs", "devices", "strategy", "accelerator"):
                assert config[section][key] == value
            if key == "class_path":
                assert config[section][key].endswith(f".{value}")


@pytest.mark.parametrize("recipe", [path for path in RECIPES if path.stem.startswith("glue")], ids=ident)
def test_every_recipe_runs(recipe: Path, arguments: list[str], tmp_path: Path) -> None:
    main(["fit", "--config", str(recipe), *arguments])
    report = json.loads((run_folder(tmp_path) / "report.json").read_text())
    assert report["data"]["samples"]["train"] > 0
    expected = yaml.safe_load(recipe.read_text())["model"]["init_args"]["strategy"]["class_path"]
    assert report["method"] == expected
    assert report["task"] == "SST-2"
    assert 0 <= report["score"] <= 1
    assert (run_folder(tmp_path) / "checkpoints" / "best.ckpt").exists()
    assert (run_folder(tmp_path) / "config.yaml").exists()


def test_the_recipe_for_decoders_goes_the_whole_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """diagnose, compress, export, test, fit, predict: what the model is made of is all that is said."""
    monkeypatch.chdir(tmp_path)
    words = ["the", "of", "and", "to", "in", "is", "that", "it", "was", "good", "bad", "film", "great", "awful", "plot"]
    for name, count in (("train", 200), ("valid", 60)):
        (tmp_path / f"{name}.txt").write_text(" ".join(words[at * at % len(words)] for at in range(count)))
    recipe = ["--config", str(CONFIGS / "recipes" / "causal_lm_kronecker.yaml"), "--data.init_args.window=16"]
    recipe += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--data.init_args.test=valid.txt"]
    model = [f"--model.init_args.pretrained={save_tiny_decoder('llama', tmp_path / 'model')}"]
    main(["diagnose", *recipe, *model, "--output=diagnosis"])
    main(["compress", *recipe, *model, "--output=small"])
    report = json.loads((tmp_path / "small" / "report.json").read_text())
    assert (report["metric"], report["method"]) == ("perplexity", "KroneckerSVD")
    assert report["metrics"]["tokens"] == report["data"]["predicted_tokens"]["validation"] == 56
    assert 0.7 < report["keep_ratio"] <= 0.8
    assert report["score"] == pytest.approx(report["score_dense"], rel=0.1)
    main(["export", "--ckpt_path=small", "--output=folder"])
    checkpoint, exported = ["--ckpt_path=small/model.ckpt"], ["--model.init_args.init_from=folder"]
    version = "--trainer.logger.init_args.version="
    main(["test", *recipe, *model, *checkpoint, f"{version}test"])
    tested = json.loads((tmp_path / "logs" / "runs" / "test" / "report.json").read_text())
    assert tested["score"] == pytest.approx(report["score"], rel=1e-6)
    assert (tested["metrics"]["tokens"], tested["metrics"]["window"]) == (56, 16)
    main(["fit", *recipe, *model, *exported, "--model.init_args.strategy=NoCompression", f"{version}fit"])
    fitted = json.loads((tmp_path / "logs" / "runs" / "fit" / "report.json").read_text())
    assert fitted["parameters"]["total"] == report["parameters"]["total"] < report["parameters"]["total_dense"]
    main(["predict", *recipe, *model, *checkpoint, f"{version}predict"])
    rows = (tmp_path / "logs" / "runs" / "predict" / "predictions.jsonl").read_text().splitlines()
    assert sum(len(json.loads(row)["prediction"]) for row in rows) == 56
    capsys.readouterr()
    main(["inspect", *recipe, *model])
    assert "14 layers factorised" in capsys.readouterr().out


def test_the_whole_way(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """fit, compress, fit again, resume, test, predict, inspect: the main job."""
    common = ["--config", str(BASE), *arguments]
    main(["fit", *common])
    dense = run_folder(tmp_path) / "checkpoints" / "best.ckpt"
    out = tmp_path / "out"
    strategy = ["--model.init_args.strategy=FWSVD", "--model.init_args.strategy.init_args.side=both"]
    strategy += ["--model.init_args.strategy.init_args.keep_ratio=0.5"]
    main(["compress", *common, *strategy, f"--model.init_args.init_from={dense}", f"--output={out}"])
    assert "after FWSVD" in capsys.readouterr().out
    compressed = json.loads((out / "report.json").read_text())
    assert compressed["keep_ratio"] == pytest.approx(7936 / 16384)
    main(["fit", *common, f"--model.init_args.init_from={out}", "--trainer.logger.init_args.version=tuned"])
    tuned = tmp_path / "logs" / "runs" / "tuned"
    report = json.loads((tuned / "report.json").read_text())
    assert (report["method"], report["init_from"]) == ("FWSVD", str(out))
    resumed = ["--trainer.max_epochs=2", "--trainer.logger.init_args.version=resumed"]
    main(["fit", *common, *resumed, f"--ckpt_path={tuned / 'checkpoints' / 'last.ckpt'}"])
    report = json.loads((tmp_path / "logs" / "runs" / "resumed" / "report.json").read_text())
    assert (report["method"], report["epochs"], report["steps"]) == ("FWSVD", 2, 4)
    checkpoint = tmp_path / "logs" / "runs" / "resumed" / "checkpoints" / "last.ckpt"
    main(["test", *common, f"--ckpt_path={checkpoint}", "--trainer.logger.init_args.version=test"])
    report = json.loads((tmp_path / "logs" / "runs" / "test" / "report.json").read_text())
    assert (report["verb"], report["parameters"]["targeted_kept"]) == ("test", 7936)
    main(["predict", *common, f"--ckpt_path={checkpoint}", "--trainer.logger.init_args.version=predict"])
    lines = (tmp_path / "logs" / "runs" / "predict" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == [0, 1]
    capsys.readouterr()
    main(["inspect", *common, f"--model.init_args.init_from={out}"])
    assert capsys.readouterr().out.count("factorised already") == 12


def test_inspect_needs_no_data(tiny_bert: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model=SequenceClassification", f"--model.init_args.pretrained={tiny_bert}"]
    main(["inspect", *model, "--model.init_args.strategy=SVD", "--model.init_args.strategy.init_args.rank_ratio=0.25"])
    assert "12 layers factorised" in capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert "--model" in capsys.readouterr().out


CONFIGURABLE: list[type] = [SVD, FWSVD, TFWSVD, NoCompression, Calibration, LayerOverride, TargetSelector]
CONFIGURABLE += [SequenceClassification, TokenClassification, MaskedLM, CausalLM]
CONFIGURABLE += [ALS, EM, SGD, Adam, AdamSGD, PreconditionedLBFGS]
CONFIGURABLE += [GLUE, TextFiles, CoNLL, TextCorpus, CausalText, Docstrings]


@pytest.mark.parametrize("cls", CONFIGURABLE)
def test_every_argument_is_typed_and_documented(cls: type) -> None:
    documented = " ".join(base.__doc__ or "" for base in cls.__mro__)
    for base in cls.__mro__:
        init = vars(base).get("__init__")
        if init is None or not base.__module__.startswith("lowrank_pl"):
            continue
        for name, parameter in list(inspect.signature(init).parameters.items())[1:]:
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                assert parameter.annotation is not parameter.empty, (cls, name)
                assert re.search(rf"\n\s+{name}: \S", documented), (cls, name)


def test_help_of_a_strategy_says_what_its_arguments_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--model=SequenceClassification", "--model.strategy.help=FWSVD"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Share of what each targeted layer costs to keep" in text
    assert "weighs by input feature (the paper)" in text


def test_own_strategy_by_class_path(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "my_methods.py").write_text(
        "from lowrank_pl.strategies import SVD\n\nclass MySVD(SVD):\n    '''A plug-in.'''\n"
    )
    config = {
        "model": {"init_args": {"strategy": {"class_path": "my_methods.MySVD", "init_args": {"keep_ratio": 0.5}}}}
    }
    (tmp_path / "plugin.yaml").write_text(yaml.safe_dump(config))
    sys.path.insert(0, str(tmp_path))
    try:
        main(["fit", "--config", str(BASE), "--config", str(tmp_path / "plugin.yaml"), *arguments])
    finally:
        sys.path.remove(str(tmp_path))
    assert json.loads((run_folder(tmp_path) / "report.json").read_text())["method"] == "MySVD"


def test_output_that_exists_is_refused_before_anything_runs(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    recipe = str(CONFIGS / "recipes" / "glue_svd.yaml")
    with pytest.raises(OutputExistsError):
        main(["compress", "--config", recipe, *arguments, f"--output={tmp_path / 'out'}"])
    assert not (tmp_path / "cache").exists()


def test_strategy_under_callbacks_is_refused(arguments: list[str], tmp_path: Path) -> None:
    overlay = {
        "trainer": {"callbacks": [{"class_path": "lowrank_pl.strategies.SVD", "init_args": {"keep_ratio": 0.5}}]}
    }
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(overlay))
    with pytest.raises(StrategyPlacementError):
        main(["fit", "--config", str(BASE), "--config", str(tmp_path / "wrong.yaml"), *arguments])


def test_folder_without_weights_is_refused(arguments: list[str], tmp_path: Path) -> None:
    folder = save_tiny_model("bert", tmp_path / "broken")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelFolderError, match="no weights"):
        main(["fit", "--config", str(BASE), *arguments, f"--model.init_args.pretrained={folder}"])


def test_checkpoints_are_looked_at_first(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "garbage.ckpt").write_bytes(b"garbage")
    for path in ("nowhere.ckpt", "garbage.ckpt", "."):
        for verb in ("fit", "test"):
            with pytest.raises(NotACheckpointError, match="--ckpt_path"):
                main([verb, "--config", str(BASE), *arguments, f"--ckpt_path={tmp_path / path}"])
    assert not (tmp_path / "cache").exists()


def test_data_need_a_tokenizer(arguments: list[str], tmp_path: Path) -> None:
    with pytest.raises(MissingArgumentError, match="take their tokenizer from it"):
        main(["fit", "--config", str(BASE), *arguments, "--model.init_args.pretrained=null"])


def test_last_checkpoint_is_the_last_epoch(arguments: list[str], tmp_path: Path) -> None:
    """Also when the score has been falling since the first: it is what a stopped run resumes from."""
    frozen = ["--trainer.max_epochs=3", "--model.init_args.optimizer.init_args.lr=0.0"]
    main(["fit", "--config", str(BASE), *arguments, *frozen])
    folder = run_folder(tmp_path) / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["best.ckpt", "last.ckpt"]
    epochs = {p.name: torch.load(p, weights_only=True)["epoch"] for p in folder.iterdir()}
    assert epochs == {"best.ckpt": 0, "last.ckpt": 2}


def test_console_prints_the_message_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_bert: str
) -> None:
    command = ["lowrank-pl", "fit", "--config", str(BASE), f"--model.init_args.pretrained={tiny_bert}"]
    command += ["--data.init_args.task=MRPX", "--trainer.accelerator=cpu"]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        console()
    assert "MRPX" in str(stop.value.code)
    assert "MRPC" in str(stop.value.code)


def test_module_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "lowrank_pl", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert all(f"\n  {verb} " in result.stdout for verb in (*VERBS, "export", "evaluate", "benchmark"))
    assert result.stdout.startswith("usage: lowrank-pl ")


def test_export_needs_a_checkpoint_and_nothing_else(arguments: list[str], tmp_path: Path) -> None:
    recipe = str(CONFIGS / "recipes" / "glue_svd.yaml")
    main(["compress", "--config", recipe, *arguments, f"--output={tmp_path / 'small'}"])
    main(["export", "--ckpt_path", str(tmp_path / "small"), "--output", str(tmp_path / "folder")])
    found = {path.name for path in (tmp_path / "folder").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "modeling_lowrank.py", "README.md"} <= found
    assert {"report.json", "ranks.png"} <= found
    card = (tmp_path / "folder" / "README.md").read_text(encoding="utf-8")
    assert "method: SVD" in card
    assert "score before compression" in card
    with pytest.raises(NotACheckpointError, match=r"no such file.*\(\*\.ckpt\) or the --output folder of compress\.$"):
        main(["export", "--ckpt_path", "nowhere.ckpt", "--output", str(tmp_path / "other")])
    # The other verbs hand the path to Lightning, which takes a file.
    with pytest.raises(
        NotACheckpointError, match=r"checkpoint in it is .*model\.ckpt'.* by this package \(\*\.ckpt\)\.$"
    ):
        main(["test", "--config", recipe, *arguments, f"--ckpt_path={tmp_path / 'small'}"])


def test_help_tells_of_export(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["export", "--help"]):
        with pytest.raises(SystemExit):
            main(words)
        assert "--ckpt_path" in capsys.readouterr().out


@pytest.mark.parametrize("strategy", ["SVD", "FWSVD", "TFWSVD", "RankDyna"])
def test_a_budget_in_measured_time_from_a_file(
    strategy: str, tiny_bert: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Up and down projections of this machine are cheap at any rank, so that ranks differ by shape."""
    shapes = [
        {"out": m, "in": n, "dense_nanoseconds": 100, "ranks": [1, 32], "nanoseconds": times}
        for (m, n), times in {(32, 32): [10, 320], (64, 32): [10, 72], (32, 64): [10, 72]}.items()
    ]
    (tmp_path / "latency.json").write_text(json.dumps({"version": 1, "shapes": shapes}), encoding="utf-8")
    cost = {"class_path": "Latency", "init_args": {"table": str(tmp_path / "latency.json")}}
    chosen = {"class_path": strategy, "init_args": {"keep_ratio": 0.5, "cost": cost}}
    model = {"class_path": "SequenceClassification", "init_args": {"pretrained": tiny_bert, "strategy": chosen}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": model}), encoding="utf-8")
    main(["inspect", "--config", str(tmp_path / "run.yaml")])
    told = capsys.readouterr().out
    assert "floor: 120 of 1,200 ns of the targeted layers" in told
    if strategy != "RankDyna":  # which knows its ranks only in the end
        assert re.search(r"0\.attention\.self\.query .* 5 +320 ", told)
        assert re.search(r"0\.intermediate\.dense .* 21 +2,016 ", told)
        assert "keeps 10,624 of 16,384 parameters (a share of 0.6484)" in told
        assert "cost: 600 of 1,200 ns (keep_ratio 0.5000)" in told


def test_new_texts_are_predicted_from_the_checkpoint_alone(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Task, classes and tokenizer are what the checkpoint tells; nothing of the training has to be said again."""
    main(["fit", "--config", str(BASE), *arguments])
    best = run_folder(tmp_path) / "checkpoints" / "best.ckpt"
    (tmp_path / "new.txt").write_text("a good film\nNA\n", encoding="utf-8")
    (tmp_path / "test.csv").write_text("text,label\ngood,positive\nbad,negative\n", encoding="utf-8")
    quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    quiet += [f"--trainer.logger.init_args.save_dir={tmp_path / 'new'}"]
    monkeypatch.chdir(tmp_path)
    main(["predict", "--ckpt_path", str(best), "--data", "TextFiles", "--data.init_args.predict=new.txt", *quiet])
    folder = tmp_path / "new" / "runs"
    rows = [json.loads(line) for line in (folder / "version_0" / "predictions.jsonl").read_text().splitlines()]
    assert [(row["index"], row["text"]) for row in rows] == [(0, "a good film"), (1, "NA")]
    assert all(list(row["probabilities"]) == ["negative", "positive"] for row in rows)
    main(["test", f"--ckpt_path={best}", "--data=TextFiles", "--data.init_args.test=test.csv", *quiet])
    report = json.loads((folder / "version_1" / "report.json").read_text())
    assert report["data"]["samples"] == {"test": 2}
