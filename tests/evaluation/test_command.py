"""The verb as a user calls it, and the harness's scores against log-likelihoods added up by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM

from lowrank_pl.cli import main
from lowrank_pl.errors.arguments import MissingArgumentError
from lowrank_pl.errors.evaluation import (
    NotALanguageModelError,
    TaskDataError,
    TaskUnusableError,
    TextStartError,
    UnknownHarnessTaskError,
)
from lowrank_pl.errors.numerics import NonFiniteScoreError, RangeError
from lowrank_pl.errors.outputs import OutputExistsError
from lowrank_pl.errors.pretrained import ModelFolderError
from lowrank_pl.errors.run import MissingPackagesError
from lowrank_pl.evaluation import evaluate
from lowrank_pl.export import export
from lowrank_pl.strategies import SVD
from lowrank_pl.surgery import TargetSelector
from lowrank_pl.tasks import CausalLM
from tests.evaluation.questions import make_questions, write_task
from tests.support.runs import make_trainer
from tests.support.synthetic import SyntheticData
from tests.support.tiny import save_tiny_decoder, tiny_decoder, tiny_tokenizer

TEXT = "\n".join(
    " ".join("abcdefghijklmnopqrstuvwxyz"[(row * 7 + i * (row % 5 + 1)) % 26] for i in range(8)) for row in range(12)
)
QUESTIONS = make_questions(TEXT, count=10, shown=5, asked=3, choices=4, seed=0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A decoder whose tokenizer puts nothing around a text, as those of decoders."""
    folder = save_tiny_decoder("llama", tmp_path_factory.mktemp("models") / "llama")
    words = tiny_tokenizer()
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    words.eos_token = "[SEP]"
    words.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder with the task `which_ending`; its data are prepared below `tmp_path`."""
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    write_task(QUESTIONS, tmp_path / "tasks")
    return str(tmp_path / "tasks")


def by_hand(folder: str, per_byte: bool) -> float:
    """The share of questions whose true ending has the highest log-likelihood."""
    model, words = AutoModelForCausalLM.from_pretrained(folder).eval(), tiny_tokenizer()
    right = 0
    for question in QUESTIONS:
        values = []
        for ending in question["endings"]:
            shown = words(question["context"], add_special_tokens=False)["input_ids"]
            asked = words(ending, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([shown + asked])).logits[0].double()
            rows = logits.log_softmax(-1)[len(shown) - 1 : -1]
            value = rows.gather(1, torch.tensor(asked)[:, None]).sum().item()
            values.append(value / len(ending.encode()) if per_byte else value)
        right += values.index(max(values)) == question["answer"]
    return right / len(QUESTIONS)


def scores(folder: Path, model: str) -> dict[str, float]:
    told = json.loads((folder / "report.json").read_text(encoding="utf-8"))["models"][model]["tasks"]["which_ending"]
    return {score["metric"]: score["value"] for score in told["scores"]}


def test_accuracy_is_that_of_log_likelihoods_and_full_rank_changes_nothing(
    llama: str, tasks: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Dense, a checkpoint and an export of full rank, vocabulary included, side by side from the command line."""
    targets = TargetSelector(embeddings=True)
    task = CausalLM(llama, strategy=SVD(rank_ratio=1.0, targets=targets))
    make_trainer(tmp_path, logger=False).compress(
        task, SyntheticData("causal_lm", size=4), output=str(tmp_path / "full")
    )
    exported = export(str(tmp_path / "full"), str(tmp_path / "export"), tokenizer=llama)
    output = tmp_path / "out"
    words = ["evaluate", "--models", llama, str(tmp_path / "full"), str(exported), "--tokenizer", llama]
    words += ["--tasks", "which_ending", "--include_path", tasks, "--output", str(output), "--batch_size", "3"]
    main(words)
    expected = {"acc": by_hand(llama, per_byte=False), "acc_norm": by_hand(llama, per_byte=True)}
    told = json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert len(told["models"]) == 3
    for model in told["models"]:
        assert scores(output, model) == expected
    assert 0 < expected["acc"] < 1
    row = told["models"][next(iter(told["models"]))]["tasks"]["which_ending"]
    assert (row["version"], row["num_fewshot"], row["samples"]) == (1.0, 0, 10)
    p = expected["acc"]
    assert row["scores"][0]["stderr"] == pytest.approx((p * (1 - p) / 9) ** 0.5)
    printed = capsys.readouterr().out
    assert (output / "report.md").read_text(encoding="utf-8") in printed
    assert f"{p:.4f} ± " in printed


def test_a_model_that_puts_out_nan_has_no_score(llama: str, tasks: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.model.layers[1].mlp.up_proj.weight.data[3, 2] = torch.nan
    shutil.copytree(llama, tmp_path / "spoiled")
    model.save_pretrained(tmp_path / "spoiled")
    with pytest.raises(NonFiniteScoreError, match=r"'spoiled' puts out is NaN .*up_proj.*--dtype float32"):
        evaluate([str(tmp_path / "spoiled")], ["which_ending"], str(tmp_path / "out"), include_path=tasks)


def test_models_get_the_same_examples_and_limits_are_told(llama: str, tasks: str, tmp_path: Path) -> None:
    again = tmp_path / "again"
    again.symlink_to(llama)
    output = evaluate([llama, str(again)], ["which_ending"], str(tmp_path / "out"), tasks, num_fewshot=3, limit=0.5)
    told = json.loads((output / "report.json").read_text(encoding="utf-8"))["models"]
    first, second = (model["tasks"]["which_ending"] for model in told.values())
    assert first == second
    assert (first["num_fewshot"], first["samples"], first["samples_of_the_task"]) == (3, 5, 10)


def test_tasks_that_cannot_be_run_are_named_before_weights_are_read(
    llama: str, tasks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowrank_pl.evaluation.command.load", lambda *_: pytest.fail("weights were read"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = Path(tasks)
    (folder / "gone.yaml").write_text(_like(folder, "gone", "questions.jsonl", "nowhere.jsonl"), encoding="utf-8")
    (folder / "hub.yaml").write_text(
        _like(folder, "hub", "dataset_path: json", "dataset_path: no/such"), encoding="utf-8"
    )
    (folder / "odd.yaml").write_text(
        _like(folder, "odd", "doc_to_text: context", "doc_to_text: '{{ a'"), encoding="utf-8"
    )
    for name, error, word in (
        ("gone", TaskDataError, "nowhere.jsonl"),
        ("hub", TaskDataError, "HF_HUB_OFFLINE"),
        ("odd", TaskUnusableError, "TemplateSyntaxError"),
    ):
        with pytest.raises(error, match=word):
            evaluate([llama], [name], str(tmp_path / "out"), tasks)
    with pytest.raises(MissingArgumentError, match=r"task's name .*which_ending.yaml', is a file's\) is missing"):
        evaluate([llama], [str(folder / "which_ending.yaml")], str(tmp_path / "out"))
    with pytest.raises(RangeError, match="0 … 9, the examples of task 'which_ending'"):
        evaluate([llama], ["which_ending"], str(tmp_path / "out"), tasks, num_fewshot=10)
    (folder / "bad.yaml").write_text("task: [", encoding="utf-8")
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(folder / "manager.py"))  # a harness with few tasks
    with pytest.raises(UnknownHarnessTaskError, match=r"'which_ened' .*bad.yaml cannot be read.*mean 'which_ending'"):
        evaluate([llama], ["which_ened"], str(tmp_path / "out"), tasks)
    assert not (tmp_path / "out").exists()


def _like(folder: Path, name: str, old: str, new: str) -> str:
    text = (folder / "which_ending.yaml").read_text(encoding="utf-8")
    assert old in text
    return text.replace("task: which_ending", f"task: {name}").replace(old, new)


@pytest.mark.parametrize(
    ("changed", "error", "word"),
    [
        ({"models": []}, MissingArgumentError, "--models"),
        ({"tasks": []}, MissingArgumentError, "--tasks"),
        ({"tasks": ["a", "a"]}, MissingArgumentError, "twice"),
        ({"num_fewshot": -1}, RangeError, "num_fewshot=-1"),
        ({"limit": 0}, RangeError, "limit=0"),
        ({"limit": 1.5}, RangeError, "limit=1.5"),
        ({"batch_size": 0}, RangeError, "batch_size=0"),
        ({"device": "cuda:99"}, MissingArgumentError, "cuda:99"),
    ],
)
def test_bad_numbers_are_refused_before_models_are_looked_at(
    tmp_path: Path, changed: dict[str, Any], error: type[Exception], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowrank_pl.evaluation.command.check_packages", lambda: None)
    monkeypatch.setattr("lowrank_pl.evaluation.command.check_model", lambda *_: pytest.fail("a model was looked at"))
    with pytest.raises(error, match=word):
        evaluate(**{"models": ["m"], "tasks": ["t"], "output": str(tmp_path / "out"), **changed})


def test_models_that_predict_no_tokens_and_folders_that_are_in_use(
    tiny_bert: str, flat_checkpoint: tuple[Any, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowrank_pl.evaluation.command.check_packages", lambda: None)
    monkeypatch.setattr("lowrank_pl.evaluation.command.load_tasks", lambda *_: pytest.fail("tasks were read"))
    tiny_decoder("llama").model.save_pretrained(tmp_path / "headless")
    tiny_decoder("llama").save_pretrained(tmp_path / "wordless")
    tiny_decoder("llama").save_pretrained(tmp_path / "endless")
    tiny_tokenizer().save_pretrained(tmp_path / "endless")
    for model, error, word in (
        (tiny_bert, NotALanguageModelError, "an encoder \\('bert'\\)"),
        (flat_checkpoint[1], NotALanguageModelError, "encoder"),
        (str(tmp_path / "headless"), NotALanguageModelError, "LlamaModel"),
        (str(tmp_path / "wordless"), ModelFolderError, "no tokenizer"),
        (str(tmp_path / "endless"), TextStartError, "neither a bos nor an eos"),
    ):
        with pytest.raises(error, match=word):
            evaluate([model], ["t"], str(tmp_path / "out"))
    with pytest.raises(OutputExistsError):
        evaluate([tiny_bert], ["t"], str(tmp_path))


def test_without_the_harness_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank_pl.evaluation.tasks.find_spec", lambda _: None)
    with pytest.raises(MissingPackagesError, match=r'pip install "lowrank-pl\[lm-eval\]"'):
        evaluate(["m"], ["t"], str(tmp_path / "out"))
