"""An exported model loads in every way that is promised, with the same logits; and nothing half-written ever does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lowrank_pl.checkpoint import describe
from lowrank_pl.contract import TargetSpec
from lowrank_pl.core import truncated_svd
from lowrank_pl.errors.arguments import MissingArgumentError
from lowrank_pl.errors.checkpoint import CheckpointMismatchError, LayoutVersionError, NotACheckpointError
from lowrank_pl.errors.export import NonFiniteWeightsError
from lowrank_pl.errors.outputs import OutputExistsError
from lowrank_pl.errors.pretrained import HubUnreachableError
from lowrank_pl.export import export, folder, from_pretrained
from lowrank_pl.monitoring import ReportWriter
from lowrank_pl.nn import LowRankLinear, PivotedLinear, dense_weight
from lowrank_pl.strategies import SVD, RankDyna
from lowrank_pl.surgery import TargetSelector, read_layout, replace_module_
from lowrank_pl.tasks import CausalLM, MaskedLM, SequenceClassification, TokenClassification
from tests.support.forks import Forks
from tests.support.runs import last_checkpoint, make_task, make_trainer
from tests.support.synthetic import SyntheticData
from tests.support.tiny import FAMILIES, save_tiny_decoder, save_tiny_model, tiny_tokenizer

CLASSES = TargetSpec("films", "classification", ("bad", "good"), ("accuracy",))
KINDS: dict[str, tuple[Any, TargetSpec]] = {
    "classification": (SequenceClassification, CLASSES),
    "regression": (SequenceClassification, TargetSpec("stars", "regression", (), ("pearson",))),
    "token_classification": (TokenClassification, TargetSpec("names", "token_classification", ("O", "B-X", "I-X"))),
    "masked_lm": (MaskedLM, TargetSpec("text", "masked_lm", (), ("perplexity",))),
}
INPUTS = {"input_ids": torch.tensor([[2, 9, 30, 7, 3], [2, 40, 3, 0, 0]])}
INPUTS["attention_mask"] = (INPUTS["input_ids"] != 0).long()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    result: Tensor = model.eval()(**INPUTS).logits
    return result


def checkpoint(pretrained: str, path: Path, kind: str = "classification") -> Any:
    """Factorises all targets but one, in both final forms, and writes a checkpoint; returns the task.

    Its head is the same in any order of the tests.
    """
    task_class, target = KINDS[kind]
    task = task_class(pretrained)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        task.build(target)
    layers = list(TargetSelector().select(task.encoder).items())
    for index, (name, linear) in enumerate(layers[1:]):
        form = PivotedLinear if index % 3 == 1 else LowRankLinear
        layer = form.empty({"rank": 2 + index % 3}, linear)
        layer.assign_(truncated_svd(dense_weight(linear).detach(), layer.rank))
        replace_module_(task.encoder, name, layer)
    told = describe(task.encoder.config, read_layout(task.encoder), target, None)
    torch.save({"state_dict": task.state_dict(), **told}, path)
    return task


REMOTE = """
import sys
sys.modules["lowrank_pl"] = None  # as where it is not installed
import torch, transformers
auto, *folders = sys.argv[1:]
for folder in folders:
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
    inputs = torch.load(folder + "-inputs.pt", weights_only=True)
    with torch.no_grad():
        torch.save(model(**inputs).logits, folder + "-logits.pt")
    model.save_pretrained(folder + "-again")
"""


def load_remotely(forks: Forks, auto_class: str, tmp_path: Path, *folders: Path) -> list[Tensor]:
    """The logits of exported folders where this package is not installed; they are saved again beside themselves."""
    for where in folders:
        torch.save(INPUTS, f"{where}-inputs.pt")
    forks.run(["-c", REMOTE, auto_class, *map(str, folders)], tmp_path)
    return [torch.load(f"{where}-logits.pt", weights_only=True) for where in folders]


def same_content(first: Path, second: Path) -> None:
    assert json.loads((first / "config.json").read_text()) == json.loads((second / "config.json").read_text())
    assert (first / "modeling_lowrank.py").read_text() == (second / "modeling_lowrank.py").read_text()
    one, two = (load_file(where / "model.safetensors") for where in (first, second))
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_loads_identically_here(family: str, tmp_path: Path) -> None:
    pretrained = str(save_tiny_model(family, tmp_path / "pretrained"))
    task = checkpoint(pretrained, tmp_path / "model.ckpt")
    where = export(str(tmp_path / "model.ckpt"), str(tmp_path / "out"))
    expected = logits(task.encoder)
    loaded = from_pretrained(str(where))
    assert torch.equal(logits(loaded), expected)
    again = SequenceClassification(init_from=str(where))
    again.build(CLASSES)
    assert torch.equal(logits(again.encoder), expected)
    loaded.save_pretrained(tmp_path / "again")
    same_content(where, tmp_path / "again")
    assert (tmp_path / "again" / "SHA256SUMS").read_text() == (where / "SHA256SUMS").read_text()


def test_loads_identically_where_the_package_is_not_installed(transformers_loaded: Forks, tmp_path: Path) -> None:
    expected, folders = [], []
    for family in ("bert", "albert", "deberta-v2", "modernbert"):
        pretrained = str(save_tiny_model(family, tmp_path / family / "pretrained"))
        expected.append(logits(checkpoint(pretrained, tmp_path / family / "model.ckpt").encoder))
        folders.append(export(str(tmp_path / family / "model.ckpt"), str(tmp_path / family / "out")))
    found = load_remotely(transformers_loaded, "AutoModelForSequenceClassification", tmp_path, *folders)
    for where, given, wanted in zip(folders, found, expected, strict=True):
        assert torch.equal(given, wanted), where
        same_content(where, Path(f"{where}-again"))


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_task(tiny_bert: str, tmp_path: Path, kind: str) -> None:
    task = checkpoint(tiny_bert, tmp_path / "model.ckpt", kind)
    where = export(str(tmp_path / "model.ckpt"), str(tmp_path / "out"))
    assert torch.equal(logits(from_pretrained(str(where))), logits(task.encoder))
    auto_map = json.loads((where / "config.json").read_text())["auto_map"]
    assert list(auto_map) == [task.auto_class.__name__]


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("bf16-true", torch.bfloat16), ("16-true", torch.float16), ("64-true", torch.float64)],
)
def test_weights_keep_the_dtype_that_they_were_trained_in(precision: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    """A decoder, whose rotary frequencies stay in float32 beside them."""
    pretrained = str(save_tiny_decoder("llama", tmp_path / "llama"))
    optimizer = lambda params: torch.optim.AdamW(params, lr=1e-3, eps=1e-4)  # noqa: E731, 1e-8 is zero in float16
    task = CausalLM(pretrained, strategy=SVD(keep_ratio=0.5), optimizer=optimizer)
    trainer = make_trainer(tmp_path, precision=precision, logger=False)
    trainer.fit(task, datamodule=SyntheticData("causal_lm", size=8))
    source, expected = last_checkpoint(trainer), logits(task.encoder)
    assert expected.dtype == dtype
    where = export(source, str(tmp_path / "out"))
    remote = AutoModelForCausalLM.from_pretrained(where, trust_remote_code=True)
    for model in (from_pretrained(str(where)), remote):
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert torch.equal(logits(model), expected)
    dense = AutoModelForCausalLM.from_pretrained(export(source, str(tmp_path / "dense"), "dense"))
    assert {parameter.dtype for parameter in dense.parameters()} == {dtype}
    torch.testing.assert_close(logits(dense), expected, rtol=0, atol=16 * torch.finfo(dtype).eps)


def test_dense_loads_in_a_vanilla_class(tiny_bert: str, tmp_path: Path) -> None:
    task = checkpoint(tiny_bert, tmp_path / "model.ckpt")
    where = export(str(tmp_path / "model.ckpt"), str(tmp_path / "out"), format="dense")
    loaded, info = AutoModelForSequenceClassification.from_pretrained(where, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(loaded).__module__.startswith("transformers.")
    assert sum(type(module) is nn.Linear for module in loaded.modules()) == 14
    torch.testing.assert_close(logits(loaded), logits(task.encoder), rtol=0, atol=1e-5)
    config = json.loads((where / "config.json").read_text())
    assert not {"auto_map", "lowrank_layout", "lowrank_base"} & config.keys()


def test_a_checkpoint_of_a_run_with_shrinking_ranks(tiny_bert: str, tmp_path: Path) -> None:
    task = make_task(tiny_bert, RankDyna(keep_ratio=0.4))
    trainer = make_trainer(tmp_path, max_epochs=2)
    trainer.fit(task, datamodule=SyntheticData())
    where = export(last_checkpoint(trainer), str(tmp_path / "out"))
    assert torch.equal(logits(from_pretrained(str(where))), logits(task.encoder))
    assert (where / "ranks.png").exists()
    card = (where / "README.md").read_text()
    assert "RankDyna" in card
    assert "base model: `bert, from a local folder`" in card
    assert f"| {task.compression.layers[0].name} | {task.compression.layers[0].rank} |" in card


def test_exporting_a_model_tuned_from_an_export(tiny_bert: str, tmp_path: Path) -> None:
    checkpoint(tiny_bert, tmp_path / "model.ckpt")
    where = export(str(tmp_path / "model.ckpt"), str(tmp_path / "out"))
    task = make_task(None, init_from=str(where))
    trainer = make_trainer(tmp_path)
    trainer.fit(task, datamodule=SyntheticData())
    for form in ("factorised", "factored", "dense"):
        again = export(last_checkpoint(trainer), str(tmp_path / form), form, tokenizer=tiny_bert)
        model: Any = AutoModelForSequenceClassification if form == "dense" else None
        loaded = model.from_pretrained(again) if model else from_pretrained(str(again))
        torch.testing.assert_close(logits(loaded), logits(task.encoder), rtol=0, atol=1e-5)


def test_nothing_is_overwritten_unasked(tiny_bert: str, tmp_path: Path) -> None:
    checkpoint(tiny_bert, tmp_path / "model.ckpt")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="--overwrite"):
        export(str(tmp_path / "model.ckpt"), str(tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    export(str(tmp_path / "model.ckpt"), str(tmp_path / "out"), overwrite=True)
    assert not (tmp_path / "out" / "mine.txt").exists()
    assert not list(tmp_path.glob(".out*"))


def test_an_interruption_leaves_no_folder(tiny_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tiny_bert, tmp_path / "model.ckpt")

    def stop(*args: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(folder, "model_card", stop)  # after the weights are written
    with pytest.raises(KeyboardInterrupt):
        export(str(tmp_path / "model.ckpt"), str(tmp_path / "out"))
    assert not list(tmp_path.glob("*out*"))


def damaged(where: Path, how: str) -> None:
    (where / "SHA256SUMS").unlink()  # it would tell first
    weights = where / "model.safetensors"
    config = json.loads((where / "config.json").read_text())
    layout = config["lowrank_layout"]
    name = next(iter(layout["modules"]))
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "missing":
        state = load_file(weights)
        del state[f"{name}.left.weight"]
        save_file(state, weights)
    elif how == "extra":
        save_file({**load_file(weights), "more": torch.zeros(1)}, weights)
    elif how == "rank":
        layout["modules"][name]["rank"] += 1
    elif how == "version":
        layout["version"] = 99
    elif how == "architecture":
        config["lowrank_base"] = "NobodyKnowsThisModel"
    (where / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("truncated", NotACheckpointError),
        ("missing", CheckpointMismatchError),
        ("extra", CheckpointMismatchError),
        ("rank", CheckpointMismatchError),
        ("version", LayoutVersionError),
        ("architecture", CheckpointMismatchError),
    ],
)
def test_a_damaged_folder_is_refused(tiny_bert: str, tmp_path: Path, how: str, error: type[Exception]) -> None:
    checkpoint(tiny_bert, tmp_path / "model.ckpt")
    where = export(str(tmp_path / "model.ckpt"), str(tmp_path / "out"))
    damaged(where, how)
    with pytest.raises(error):
        from_pretrained(str(where))


def test_other_things_are_refused(tiny_bert: str, tmp_path: Path) -> None:
    with pytest.raises(NotACheckpointError):
        export(str(tmp_path / "nothing.ckpt"), str(tmp_path / "out"))
    with pytest.raises(NotACheckpointError, match="transformers"):
        from_pretrained(tiny_bert)
    checkpoint(tiny_bert, tmp_path / "model.ckpt")
    with pytest.raises(MissingArgumentError, match="report"):
        export(str(tmp_path / "model.ckpt"), str(tmp_path / "out"), report=str(tmp_path / "no.json"))
    assert not (tmp_path / "out").exists()


def test_a_folder_is_not_replaced_by_what_is_made_from_it(tiny_bert: str, tmp_path: Path) -> None:
    """Replacing it would delete the checkpoint."""
    compressed = tmp_path / "compressed"
    compressed.mkdir()
    checkpoint(tiny_bert, compressed / "model.ckpt")
    for source in (compressed, compressed / "model.ckpt"):
        with pytest.raises(OutputExistsError, match="holds the checkpoint"):
            export(str(source), str(compressed), overwrite=True)
    assert [entry.name for entry in compressed.iterdir()] == ["model.ckpt"]


def test_a_diverged_model_is_not_written(tiny_bert: str, tmp_path: Path) -> None:
    checkpoint(tiny_bert, tmp_path / "model.ckpt")
    saved = torch.load(tmp_path / "model.ckpt", weights_only=True)
    saved["state_dict"]["encoder.classifier.weight"][0, 0] = float("nan")
    torch.save(saved, tmp_path / "model.ckpt")
    with pytest.raises(NonFiniteWeightsError, match=r"'classifier\.weight' contains NaN"):
        export(str(tmp_path / "model.ckpt"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_model_is_refused(
    tiny_bert: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its larger ids would end in an index error, or on a GPU in an assertion, wherever the folder is used."""
    checkpoint(tiny_bert, tmp_path / "model.ckpt")
    words = tiny_tokenizer()
    words.add_tokens(["another"])
    words.save_pretrained(tmp_path / "larger")
    config = json.dumps({"model_type": "bert"})
    (tmp_path / "larger" / "config.json").write_text(config)
    with pytest.raises(CheckpointMismatchError, match=r"tokens and the model embeddings for .*--tokenizer"):
        export(str(tmp_path / "model.ckpt"), str(tmp_path / "out"), tokenizer=str(tmp_path / "larger"))
    assert not (tmp_path / "out").exists()
    words = tiny_tokenizer()
    words.pad_token = "[UNK]"
    words.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text(config)
    export(str(tmp_path / "model.ckpt"), str(tmp_path / "out"), tokenizer=str(tmp_path / "other"))
    assert "pads with token 1, the model with 0" in caplog.text


def test_a_checkpoint_from_elsewhere_asks_for_its_tokenizer(tiny_bert: str, tmp_path: Path) -> None:
    checkpoint(tiny_bert, tmp_path / "model.ckpt")
    saved = torch.load(tmp_path / "model.ckpt", weights_only=True)
    saved["lowrank_task"]["tokenizer"] = "/elsewhere/bert"
    torch.save(saved, tmp_path / "model.ckpt")
    source, out = str(tmp_path / "model.ckpt"), str(tmp_path / "out")
    with pytest.raises(MissingArgumentError, match=r"'/elsewhere/bert' that the checkpoint tells of .*--tokenizer"):
        export(source, out)
    with pytest.raises(HubUnreachableError, match="/nowhere"):
        export(source, out, tokenizer="/nowhere")
    export(source, out, tokenizer=tiny_bert)


def test_a_damaged_report_is_told(tiny_bert: str, tmp_path: Path) -> None:
    checkpoint(tiny_bert, tmp_path / "model.ckpt")
    for content in ("{", "[]"):
        (tmp_path / "report.json").write_text(content)
        with pytest.raises(MissingArgumentError, match=r"report.* in '.*report\.json'"):
            export(str(tmp_path / "model.ckpt"), str(tmp_path / "out"))


def test_the_card_quotes_the_score_of_the_checkpoint_that_is_exported(tiny_bert: str, tmp_path: Path) -> None:
    """The run's report tells the last validation's, which is not the best checkpoint's."""
    (tmp_path / "checkpoints").mkdir()
    best = {"checkpoint": "/elsewhere/best.ckpt", "checkpoint_score": 0.75, "checkpoint_monitor": "val/score"}
    told = {"verb": "fit", "score": 0.5, "metric": "f1", "split": "val", "command": "", "versions": {}, **best}
    (tmp_path / "report.json").write_text(json.dumps(told))
    lines = {
        "best.ckpt": "* score: 0.7500 (f1, val split)",
        "last.ckpt": "* score: 0.5000 (f1, val split)",
        "epoch=0.ckpt": "* score: none, the report's score is that of another checkpoint",
    }
    for name, line in lines.items():
        checkpoint(tiny_bert, tmp_path / "checkpoints" / name)
        export(str(tmp_path / "checkpoints" / name), str(tmp_path / name.removesuffix(".ckpt")))
        assert line in (tmp_path / name.removesuffix(".ckpt") / "README.md").read_text().splitlines()


@pytest.mark.parametrize(
    ("of_the_run", "line"),
    [
        ({"score_step": 4, "score": 0.5}, "* score: 0.5000 (f1, val split)"),
        ({"score_step": 4, "score": 0.5, "checkpoint_monitor": "val/loss"}, "* score: 0.5000 (f1, val split)"),
        ({"score_step": 8, "score": 0.5, "checkpoint_monitor": "val/loss"}, "* val/loss: 0.2500"),
        ({"score_step": 4, "score": None}, "* score: n/a (f1, val split)"),
        (
            {"score_step": 8, "score": 0.5},
            "* score: none, the report's score is that of step 8 of the run, this checkpoint is of step 4",
        ),
    ],
)
def test_the_card_has_the_score_of_a_checkpoint_that_was_kept_for_something_else_or_for_nothing(
    tiny_bert: str, tmp_path: Path, of_the_run: dict[str, Any], line: str
) -> None:
    """As Lightning's own `ModelCheckpoint` without a monitor keeps the last step's."""
    checkpoint(tiny_bert, tmp_path / "step=4.ckpt")
    saved = torch.load(tmp_path / "step=4.ckpt", weights_only=True)
    torch.save({**saved, "global_step": 4}, tmp_path / "step=4.ckpt")
    value = 0.25 if "checkpoint_monitor" in of_the_run else None
    told = {"verb": "fit", "metric": "f1", "split": "val", "command": "", "versions": {}, "checkpoint": "step=4.ckpt"}
    (tmp_path / "report.json").write_text(json.dumps({**told, "checkpoint_score": value, **of_the_run}))
    export(str(tmp_path / "step=4.ckpt"), str(tmp_path / "out"))
    assert line in (tmp_path / "out" / "README.md").read_text().splitlines()


def test_a_checkpoint_on_the_way_is_told_as_it_is(
    tiny_bert: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither with the ranks nor with the score that the run came to later."""
    every = ModelCheckpoint(tmp_path / "checkpoints", "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = make_trainer(tmp_path, max_epochs=2, callbacks=[ReportWriter(), every])
    trainer.fit(make_task(tiny_bert, RankDyna(keep_ratio=0.4)), datamodule=SyntheticData())
    report = str(Path(trainer.log_dir or "") / "report.json")
    for step, unreached in ((2, True), (10, False), (12, False)):
        source, where = str(tmp_path / "checkpoints" / f"step={step}.ckpt"), tmp_path / f"out-{step}"
        caplog.clear()
        model = from_pretrained(str(export(source, str(where), report=report)))
        told, card = json.loads((where / "report.json").read_text()), (where / "README.md").read_text()
        parameters = told["parameters"]
        assert parameters["total"] == sum(parameter.numel() for parameter in model.parameters())
        assert parameters["targeted_kept"] == sum(layer["parameters"] for layer in told["layers"])
        assert (parameters["targeted_kept"] / parameters["targeted_dense"] == told["keep_ratio"] == 1) == unreached
        assert [unreached] * 3 == [x in caplog.text + card for x in ("is above its", "**above its", "not been reached")]
        assert told["steps"] == step
        assert (told["score"] is None) == ("step 12 of the run, this checkpoint is of step" in card) == (step != 12)
        assert "checkpoint_score" not in told or step == 12


def test_a_folder_of_an_architecture_that_is_not_known_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    with pytest.raises(NotACheckpointError, match=r"from_pretrained=.*knows no model_type 'nothing'"):
        from_pretrained(str(tmp_path))
