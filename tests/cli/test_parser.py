"""A typing error ends in what was wrong and what was probably meant."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lowrank_pl.cli import main

RECIPE = ["--config", str(Path(__file__).parents[2] / "configs" / "recipes" / "glue_finetune.yaml")]
KRONECKER = ["--config", str(Path(RECIPE[1]).with_name("glue_kronecker.yaml"))]
DECODER = Path(RECIPE[1]).with_name("causal_lm_kronecker.yaml")
STRATEGY = "--model.init_args.strategy"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["fit", *RECIPE, "--trainer.max_epoch", "3"], "no option --trainer.max_epoch. Did you mean '--trainer.max_ep"),
        (["compress", *RECIPE, "--outpt", "x"], "lowrank-pl compress: no option --outpt. Did you mean '--output'?"),
        (
            ["fit", *RECIPE, "--config", "typo.yaml"],
            "no option 'trainer.max_epoch'. Did you mean 'trainer.max_epochs'?",
        ),
        (
            ["fit", *RECIPE, STRATEGY, "SVD", f"{STRATEGY}.init_args.keepratio", "0.3"],
            "SVD (--model.init_args.strategy) has no argument 'keepratio'. Did you mean 'keep_ratio'?",
        ),
        (["fit", *RECIPE, f"{STRATEGY}.init_args.zzz", "1"], "NoCompression (--model.init_args.strategy) has no arg"),
        (
            ["fit", *RECIPE, "--data.init_args.batchsize", "8"],
            "GLUE (--data) has no argument 'batchsize'. Did you mean '",
        ),
        (
            ["fit", "--config", str(DECODER), "--data.init_args.max_length", "32"],
            "CausalText (--data) has no argument 'max_length'. Did you mean 'window'?",
        ),
        (
            ["fit", *RECIPE, STRATEGY, "FWSDV"],
            "Did you mean 'FW",
        ),
        (["fit", *RECIPE, "--data", "TextFile"], "Did you mean 'TextFiles'?"),
        (["fit", *RECIPE, "--trainer.max_epochs", "three"], "--trainer.max_epochs expects int, not 'three'."),
        (
            ["fit", *RECIPE, "--data", "TextFiles", "--data.init_args.label_names", "[no, yes]"],
            "expects str, not '[False, True]'. YAML reads yes, no, on and off as true and false: quote them.",
        ),
        (
            ["fit", *RECIPE, STRATEGY, "FWSVD", f"{STRATEGY}.init_args.side", "inputs"],
            "--model.init_args.strategy.init_args.side 'inputs' is none of input, output, both. Did you mean 'input'?",
        ),
        (
            ["fit", *KRONECKER, f"{STRATEGY}.init_args.calibration.labels", "none"],
            "labels 'none' is none of observed, sampled. 'observed' are the labels of the data, 'sampled' are drawn "
            "from what the model predicts and need none there. 'none', no gradients at labels, is a choice of the "
            "metric: KroneckerSVD with side 'input'.",
        ),
        (
            ["fit", *KRONECKER, f"{STRATEGY}.init_args.allocation.floor", "0.5"],
            "gets an argument before its class is known. Name the class first, one of Global, Uniform,",
        ),
        (["fit", "--config", "nowhere.yaml"], "--config: File does not exist"),
        (["fit", "--config", "broken.yaml"], "Problems parsing config"),
        (["fit"], "lowrank-pl fit: --model is missing."),
        (["export", "--ckpt_path", "x"], "lowrank-pl export: --output is missing."),
        (["export", "--ckpt_path", "x", "--output", "y", "--format", "onxx"], "Did you mean 'onnx'?"),
    ],
)
def test_typing_errors(
    words: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "typo.yaml").write_text("trainer:\n  max_epoch: 3\n")
    (tmp_path / "broken.yaml").write_text("trainer:\n  max_epochs: 3\n : x")
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert told in lines[0]
    assert lines[1:] == [f"See `lowrank-pl {words[0]} --help`."]


def test_null_clears_what_a_recipe_sets(capsys: pytest.CaptureFixture[str]) -> None:
    cleared = [f"{STRATEGY}.init_args.refit", f"{STRATEGY}.init_args.calibration.max_samples"]
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(DECODER), cleared[0], "null", f"{cleared[1]}=null", "--print_config"])
    strategy = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["strategy"]["init_args"]
    assert strategy["refit"] is None
    assert strategy["calibration"]["max_samples"] is None
    assert strategy["calibration"]["batch_size"] == 4


@pytest.mark.parametrize(
    "beside", [["recipes/glue_rankdyna.yaml"], ["recipes/glue_finetune.yaml", "strategy/rankdyna.yaml"]]
)
def test_another_score_gets_its_own_defaults(beside: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    configs = [f"--config={Path(RECIPE[1]).parents[1] / name}" for name in beside]
    words = [f"{STRATEGY}.init_args.sensitivity=FirstOrder", f"{STRATEGY}.init_args.schedule=null"]
    with pytest.raises(SystemExit):
        main(["fit", *configs, *(words if len(beside) == 1 else words[:1]), "--print_config"])
    strategy = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["strategy"]["init_args"]
    assert strategy["sensitivity"]["init_args"] == {"beta": 0.85}
    assert strategy["schedule"] is None


def test_debugging_shows_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWRANK_PL_DEBUG", "1")
    with pytest.raises(SystemExit):
        main(["fit", *RECIPE, STRATEGY, "FWSDV"])
