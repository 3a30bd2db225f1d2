from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from lightning.pytorch.trainer.states import TrainerFn

from lowrank_pl.data import GLUE
from lowrank_pl.data.glue_tasks import TASKS, find_task
from lowrank_pl.errors.data import ArgumentRangeError, EmptyDataError, OfflineError, UnknownTaskError
from lowrank_pl.errors.data_files import (
    EncodingError,
    MalformedLineError,
    MissingFileError,
    MissingValueError,
    UnknownColumnError,
)
from lowrank_pl.errors.labels import NotANumberError, SingleClassError, UnknownLabelError
from tests.data.samples import write, write_sst2, write_tsv

MRPC = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
STSB = ["index", "sentence1", "sentence2", "score"]
NLI = ["index", "sentence1", "sentence2", "gold_label"]


def ready(tokenizer: str, task: str, path: Path | None, **arguments: Any) -> GLUE:
    module = GLUE(tokenizer, task, None if path is None else str(path), max_length=64, **arguments)
    module.prepare_data()
    module.setup()
    return module


def texts(module: GLUE, split: str) -> list[str]:
    tokenizer = module.load_tokenizer()
    return [str(tokenizer.decode(ids)) for ids in module.split(split)["input_ids"]]


@pytest.mark.parametrize(
    ("spelling", "name"),
    [("CoLA", "CoLA"), ("sst2", "SST-2"), ("SST-2", "SST-2"), ("stsb", "STS-B"), ("sts-b", "STS-B"), ("MRPC", "MRPC")],
)
def test_tasks_are_found_in_any_spelling(spelling: str, name: str) -> None:
    assert find_task(spelling).name == name


def test_unknown_task() -> None:
    told = (
        r"no GLUE task is called 'mprc'; there are 'CoLA', 'SST-2', .* Did you mean 'MRPC'\? Check data.init_args.task"
    )
    with pytest.raises(UnknownTaskError, match=told):
        GLUE("any", "mprc")


@pytest.mark.parametrize("argument", ["mnli_validation", "bad_lines", "empty_texts"])
def test_words_that_are_no_choice(argument: str) -> None:
    with pytest.raises(ArgumentRangeError, match=f"{argument}='ignore'; allowed is '.*', '.*'. Check data.init_args"):
        GLUE("any", "MNLI", **{argument: "ignore"})  # type: ignore[arg-type]


def test_official_metrics() -> None:
    expected = {
        "CoLA": (("matthews",), None),
        "SST-2": (("accuracy",), None),
        "MRPC": (("f1", "accuracy"), "f1"),
        "STS-B": (("pearson", "spearman"), None),
        "QQP": (("f1", "accuracy"), "f1"),
        "MNLI": (("accuracy",), None),
        "QNLI": (("accuracy",), None),
        "RTE": (("accuracy",), None),
        "WNLI": (("accuracy",), None),
    }
    assert {task.name: (task.target.metrics, task.target.score) for task in TASKS} == expected


def test_mrpc_with_byte_order_mark_and_stray_quotes(tiny_bert: str, tmp_path: Path) -> None:
    rows = [["1", "1", "2", 'good " film', "great"], ["0", "3", "4", '" bad', "it 's \" awful"]]
    for name in ("train", "dev"):
        path = write_tsv(tmp_path / "MRPC" / f"{name}.tsv", MRPC, rows)
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    module = ready(tiny_bert, "mrpc", tmp_path)  # the folder above is enough
    assert module.target.name == "MRPC"
    assert module.target.label_names == ("not_equivalent", "equivalent")
    assert module.split("train")["labels"][:] == [1, 0]
    first, second = texts(module, "train")
    assert first == "[CLS] good [UNK] film [SEP] great [SEP]"
    assert second == "[CLS] [UNK] bad [SEP] it ' s [UNK] awful [SEP]"
    assert "test" not in module._ready().splits
    assert sorted(len(batch["labels"]) for batch in module.predict_dataloader()) == [2]


def test_cola_has_no_header_but_in_its_test_file(tiny_bert: str, tmp_path: Path) -> None:
    rows = [["gj04", "1", "", "the film is good"], ["gj04", "0", "*", "film the good is"]]
    write_tsv(tmp_path / "train.tsv", None, rows)
    write_tsv(tmp_path / "dev.tsv", None, rows[:1])
    write_tsv(tmp_path / "test.tsv", ["index", "sentence"], [["0", "bad plot"]])
    module = ready(tiny_bert, "cola", tmp_path)
    assert module.split("train")["labels"][:] == [1, 0]
    assert texts(module, "train")[0] == "[CLS] the film is good [SEP]"
    assert texts(module, "test") == ["[CLS] bad plot [SEP]"]


def test_stsb_is_regression(tiny_bert: str, tmp_path: Path) -> None:
    for name in ("train", "dev"):
        write_tsv(tmp_path / f"{name}.tsv", STSB, [["0", "good", "bad", "5.000"], ["1", "film", "plot", "0.25"]])
    module = ready(tiny_bert, "stsb", tmp_path)
    assert (module.target.kind, module.target.label_names) == ("regression", ())
    labels = next(iter(module.val_dataloader()))["labels"]
    assert labels.dtype == torch.float32
    assert sorted(labels.tolist()) == [0.25, 5.0]


@pytest.mark.parametrize("which", ["matched", "mismatched"])
def test_mnli_validates_on_either_part(tiny_bert: str, tmp_path: Path, which: Any) -> None:
    labels = ["neutral", "contradiction", "entailment"]
    write_tsv(tmp_path / "train.tsv", NLI, [["0", "good", "bad", label] for label in labels])
    # The official development files have more columns than the training file.
    for part, word in {"matched": "film", "mismatched": "plot"}.items():
        write_tsv(tmp_path / f"dev_{part}.tsv", [*NLI[:3], "label1", NLI[3]], [["0", word, word, "neutral", labels[1]]])
        write_tsv(tmp_path / f"test_{part}.tsv", NLI[:3], [["0", word, "good"]])
    module = ready(tiny_bert, "MNLI", tmp_path, mnli_validation=which)
    word = {"matched": "film", "mismatched": "plot"}[which]
    assert module.target.label_names == ("entailment", "neutral", "contradiction")
    assert module.split("train")["labels"][:] == [1, 2, 0]
    assert texts(module, "validation") == [f"[CLS] {word} [SEP] {word} [SEP]"]
    assert texts(module, "test") == [f"[CLS] {word} [SEP] good [SEP]"]
    assert module.split("validation")["labels"][:] == [2]


@pytest.mark.parametrize(
    ("task", "label", "ids"),
    [("rte", "label", {"entailment": 0, "not_entailment": 1}), ("wnli", "label", {"1": 1, "0": 0})],
)
def test_labels_have_the_ids_of_the_hub(
    tiny_bert: str, tmp_path: Path, task: str, label: str, ids: dict[str, int]
) -> None:
    rows = [["0", "good", "bad", name] for name in ids]
    for name in ("train", "dev"):
        write_tsv(tmp_path / f"{name}.tsv", ["index", "sentence1", "sentence2", label], rows)
    assert ready(tiny_bert, task, tmp_path).split("train")["labels"][:] == list(ids.values())


# Bad files.


def test_missing_file(tiny_bert: str, tmp_path: Path) -> None:
    write_sst2(tmp_path)
    (tmp_path / "dev.tsv").rename(tmp_path / "devel.tsv")
    told = r"no data file at '.*dev.tsv': its folder holds 'devel.tsv', 'test.tsv', .* Did you mean 'devel.tsv'\? Check"
    with pytest.raises(MissingFileError, match=told):
        ready(tiny_bert, "sst2", tmp_path)


def test_the_files_of_another_task(tiny_bert: str, tmp_path: Path) -> None:
    told = r"no column '#1 String' in '.*train.tsv'; it has 'sentence', 'label'. Check data.init_args.task"
    with pytest.raises(UnknownColumnError, match=told):
        ready(tiny_bert, "mrpc", write_sst2(tmp_path))


def test_ragged_line(tiny_bert: str, tmp_path: Path) -> None:
    write_sst2(tmp_path)
    write(tmp_path / "train.tsv", "sentence\tlabel\ngood\t1\nbad\tfilm\t0\nawful\t0\n")
    told = r"train.tsv:3 has 3 column\(s\); expected 2: sentence, label. .* data.init_args.bad_lines=skip"
    with pytest.raises(MalformedLineError, match=told):
        ready(tiny_bert, "sst2", tmp_path)
    with pytest.warns(UserWarning, match=r"left out 1 malformed line\(s\) of '.*train.tsv', first 3"):
        module = ready(tiny_bert, "sst2", tmp_path, bad_lines="skip")
    assert texts(module, "train") == ["[CLS] good [SEP]", "[CLS] awful [SEP]"]


def test_only_newlines_end_a_line(tiny_bert: str, tmp_path: Path) -> None:
    write_sst2(tmp_path)
    write(tmp_path / "train.tsv", "sentence\tlabel\r\ngood\u2028film\x85\t1\r\nbad\t0\r\n")
    assert ready(tiny_bert, "sst2", tmp_path).split("train")["labels"][:] == [1, 0]


def test_not_utf8(tiny_bert: str, tmp_path: Path) -> None:
    write_sst2(tmp_path)
    write(tmp_path / "dev.tsv", "sentence\tlabel\ncafé\t1\n", encoding="latin-1")
    told = r"'.*dev.tsv' is not UTF-8: byte 0xe9 at offset 18; expected UTF-8"
    with pytest.raises(EncodingError, match=told):
        ready(tiny_bert, "sst2", tmp_path)


def test_label_outside_the_classes(tiny_bert: str, tmp_path: Path) -> None:
    write_sst2(tmp_path)
    write(tmp_path / "dev.tsv", "sentence\tlabel\ngood\t1\nbad\t2\n")
    with pytest.raises(UnknownLabelError, match=r"dev.tsv:3 is labelled '2'; allowed are '0', '1'"):
        ready(tiny_bert, "sst2", tmp_path)


@pytest.mark.parametrize("score", ["high", "nan", "inf", ""])
def test_score_that_is_no_number(tiny_bert: str, tmp_path: Path, score: str) -> None:
    for name in ("train", "dev"):
        write_tsv(tmp_path / f"{name}.tsv", STSB, [["0", "good", "bad", "1"], ["1", "film", "plot", score]])
    with pytest.raises(NotANumberError, match=rf"train.tsv:3 has the regression target '{score}'; allowed are finite"):
        ready(tiny_bert, "stsb", tmp_path)


def test_score_outside_the_scale(tiny_bert: str, tmp_path: Path) -> None:
    for name in ("train", "dev"):
        write_tsv(tmp_path / f"{name}.tsv", STSB, [["0", "good", "bad", "5.5"]])
    with pytest.raises(UnknownLabelError, match=r"train.tsv:2 is labelled '5.5'; allowed are scores from 0 to 5"):
        ready(tiny_bert, "stsb", tmp_path)


def test_one_class(tiny_bert: str, tmp_path: Path) -> None:
    write_sst2(tmp_path)
    write(tmp_path / "train.tsv", "sentence\tlabel\ngood\t1\ngreat\t1\n")
    with pytest.raises(SingleClassError, match=r"all 2 training samples of '.*train.tsv' are labelled 'positive'"):
        ready(tiny_bert, "sst2", tmp_path)


@pytest.mark.parametrize("content", ["", "sentence\tlabel\n"])
def test_empty_file(tiny_bert: str, tmp_path: Path, content: str) -> None:
    write_sst2(tmp_path)
    write(tmp_path / "dev.tsv", content)
    with pytest.raises(EmptyDataError, match=r"no samples in '.*dev.tsv'; at least one is needed"):
        ready(tiny_bert, "sst2", tmp_path)


# The hub.


def hub_mrpc(name: str, task: str) -> DatasetDict:
    assert (name, task) == ("nyu-mll/glue", "mrpc")
    label = ClassLabel(names=["not_equivalent", "equivalent"])
    features = Features(
        {"sentence1": Value("string"), "sentence2": Value("string"), "label": label, "idx": Value("int32")}
    )

    def split(labels: list[int]) -> Dataset:
        size = len(labels)
        columns = {"sentence1": ["good"] * size, "sentence2": ["bad"] * size, "label": labels, "idx": list(range(size))}
        return Dataset.from_dict(columns, features=features)

    return DatasetDict({"train": split([1, 0, 1]), "validation": split([0]), "test": split([-1, -1])})


def test_from_the_hub(tiny_bert: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", hub_mrpc)
    module = ready(tiny_bert, "MRPC", None)
    assert module.split("train")["labels"][:] == [1, 0, 1]
    assert texts(module, "validation") == ["[CLS] good [SEP] bad [SEP]"]
    assert "labels" not in module.split("test").column_names
    assert module.target == find_task("MRPC").target


def test_offline(tiny_bert: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str, task: str) -> DatasetDict:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    told = (
        r"cannot load 'nyu-mll/glue \(sst2\)' from the Hugging Face hub \(Couldn't reach the Hub\). "
        r"Download the official SST-2 TSV files elsewhere and give their folder as data.init_args.path."
    )
    with pytest.raises(OfflineError, match=told):
        ready(tiny_bert, "sst2", None)


def test_rows_without_a_sentence(tiny_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused from the hub and from files alike, or left out; every row of the test split is predicted."""
    whole = hub_mrpc("nyu-mll/glue", "mrpc")
    rows = [{**whole["train"][0], "sentence2": text} for text in ("bad", " ", "bad")]
    rows[2]["label"] = 0
    train = Dataset.from_list(rows, features=whole["train"].features)
    test = Dataset.from_list([{**whole["test"][0], "sentence1": ""}], features=whole["test"].features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: DatasetDict({**whole, "train": train, "test": test}))
    with pytest.raises(MissingValueError, match=r"mrpc, rows\):2 has nothing but white space, ' ', in column"):
        ready(tiny_bert, "MRPC", None)
    with pytest.warns(UserWarning, match="left out 1 of 3 rows"):
        module = ready(tiny_bert, "MRPC", None, empty_texts="skip")
    assert module.split("train")["labels"][:] == [1, 0]
    assert len(module.split("test")) == 1
    for name in ("train", "dev"):
        write_tsv(tmp_path / f"{name}.tsv", MRPC, [["1", "0", "0", "good", "bad"], ["0", "0", "0", "", "bad"]])
    with pytest.raises(MissingValueError, match=r"train.tsv:3 has no value in column '#1 String'"):
        ready(tiny_bert, "MRPC", tmp_path)


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_files_that_a_verb_does_not_read_need_not_be_there(tiny_bert: str, tmp_path: Path, verb: str) -> None:
    folder = write_sst2(tmp_path / "sst2")
    (folder / "train.tsv").unlink()
    if verb == "validate":
        (folder / "test.tsv").unlink()
    if verb == "predict":
        (folder / "dev.tsv").unlink()
    module = GLUE(tiny_bert, "SST-2", str(folder), max_length=32)
    module.trainer = SimpleNamespace(state=SimpleNamespace(fn=TrainerFn(verb)), distributed_sampler_kwargs=None)  # type: ignore[assignment]
    module.prepare_data()
    module.setup()
    loaders = {"validate": module.val_dataloader, "test": module.test_dataloader, "predict": module.predict_dataloader}
    assert sum(len(batch["input_ids"]) for batch in loaders[verb]()) == (5 if verb == "predict" else 11)
    with pytest.raises(MissingFileError, match=r"no data file at '.*train.tsv'.* Check data.init_args.path"):
        module.calibration_batches(4)
