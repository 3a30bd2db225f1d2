from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn

from lowrank_pl.contract import TargetSpec
from lowrank_pl.data import TextFiles
from lowrank_pl.errors.data import ArgumentRangeError, EmptyDataError, TooFewSamplesError
from lowrank_pl.errors.data_files import (
    DuplicateColumnError,
    EncodingError,
    MalformedFileError,
    MalformedLineError,
    MissingFileError,
    MissingSplitError,
    MissingValueError,
    NotATextError,
    UnknownColumnError,
    UnsupportedFormatError,
)
from lowrank_pl.errors.labels import (
    MissingLabelsError,
    NotANumberError,
    SingleClassError,
    UnknownClassesError,
    UnknownLabelError,
)
from lowrank_pl.errors.run import TargetKindError
from tests.data.samples import write

ROWS: list[dict[str, Any]] = [
    {"text": "good film", "other": "great", "label": "pos"},
    {"text": 'a "bad", plot', "other": "awful", "label": "neg"},
    {"text": "the film", "other": "is good", "label": "neutral"},
]


def save(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        return str(write(path, "".join(json.dumps(row) + "\n" for row in rows)))
    if path.suffix == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
        return str(path)

    def spelled(value: object) -> str:
        text = "" if value is None else str(value)
        return '"' + text.replace('"', '""') + '"' if path.suffix == ".csv" and '"' in text else text

    lines = [list(rows[0]), *([spelled(value) for value in row.values()] for row in rows)]
    return str(write(path, "".join({".csv": ",", ".tsv": "\t"}[path.suffix].join(line) + "\n" for line in lines)))


def ready(tokenizer: str, **arguments: Any) -> TextFiles:
    module = TextFiles(tokenizer, **{"max_length": 32, **arguments})
    module.prepare_data()
    module.setup()
    return module


def labels(module: TextFiles, split: str) -> list[Any]:
    return list(module.split(split)["labels"])


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_formats_agree(tiny_bert: str, tmp_path: Path, suffix: str) -> None:
    train = save(tmp_path / f"train{suffix}", ROWS)
    module = ready(tiny_bert, train=train, validation=train, test=train, text_pair="other")
    assert module.target.label_names == ("neg", "neutral", "pos")
    assert module.target.metrics == ("accuracy",)
    assert labels(module, "train") == [2, 0, 1]
    decoded = [module.load_tokenizer().decode(ids) for ids in module.split("train")["input_ids"]]
    assert decoded == [
        "[CLS] good film [SEP] great [SEP]",
        "[CLS] a [UNK] bad [UNK] , plot [SEP] awful [SEP]",
        "[CLS] the film [SEP] is good [SEP]",
    ]
    assert module.has_labelled_test
    assert sum(len(batch["labels"]) for batch in module.test_dataloader()) == 3


def test_quoted_csv_may_span_lines(tiny_bert: str, tmp_path: Path) -> None:
    content = '\ufefftext,label\r\n"good,\r\nfilm",a\r\n\r\nbad,b\r\n'
    path = str(write(tmp_path / "train.csv", content))
    module = ready(tiny_bert, train=path, validation=path)
    assert module.load_tokenizer().decode(module.split("train")["input_ids"][0]) == "[CLS] good , film [SEP]"


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_whole_numbers_keep_their_order(tiny_bert: str, tmp_path: Path, suffix: str) -> None:
    train = save(tmp_path / f"train{suffix}", [{"text": "good", "label": label} for label in (10, 9, -1, 10)])
    module = ready(tiny_bert, train=train, validation=train)
    assert module.target.label_names == ("-1", "9", "10")
    assert labels(module, "train") == [2, 1, 0, 2]


def test_named_classes_may_be_given_as_ids(tiny_bert: str, tmp_path: Path) -> None:
    train = save(tmp_path / "train.jsonl", [{"text": "good", "label": label} for label in (1, "bad", 0.0, True)][:3])
    module = ready(tiny_bert, train=train, validation=train, label_names=["bad", "good"])
    assert module.target.label_names == ("bad", "good")
    assert labels(module, "train") == [1, 0, 0]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_whole_numbers_are_the_same_classes_in_every_spelling(tiny_bert: str, tmp_path: Path, suffix: str) -> None:
    train = save(tmp_path / "train.csv", [{"text": "good", "label": label} for label in ("1.0", "2.0", "3.0")])
    dev = save(tmp_path / f"dev{suffix}", [{"text": "good", "label": label} for label in (2.0, 1.0)])
    ints = save(tmp_path / f"test{suffix}", [{"text": "good", "label": label} for label in (2, 1)])
    module = ready(tiny_bert, train=train, validation=dev, test=ints)
    assert module.target.label_names == ("1.0", "2.0", "3.0")
    assert labels(module, "validation") == labels(module, "test") == [1, 0]


def test_classes_that_are_learnt_are_given_by_name(tiny_bert: str, tmp_path: Path) -> None:
    train = save(tmp_path / "train.csv", ROWS)
    dev = save(tmp_path / "dev.csv", [{**ROWS[0], "label": 1}])
    with pytest.raises(UnknownLabelError, match=r"dev.csv:2 is labelled '1'; allowed are 'neg', 'neutral', 'pos'"):
        ready(tiny_bert, train=train, validation=dev)


def test_regression(tiny_bert: str, tmp_path: Path) -> None:
    train = save(tmp_path / "train.csv", [{"text": "good", "label": label} for label in (0.5, -2, 3)])
    module = ready(tiny_bert, train=train, validation=train, kind="regression")
    assert (module.target.kind, module.target.metrics) == ("regression", ("pearson", "spearman"))
    assert labels(module, "train") == [0.5, -2.0, 3.0]
    assert next(iter(module.train_dataloader()))["labels"].dtype == torch.float32


def test_a_part_is_set_aside_for_validation(tiny_bert: str, tmp_path: Path) -> None:
    words = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n", "o", "p", "q", "r", "s", "t"]
    train = save(tmp_path / "train.csv", [{"text": word, "label": at % 2} for at, word in enumerate(words)])
    parts = []
    for seed in (0, 0, 1):
        module = ready(tiny_bert, train=train, validation_fraction=0.25, seed=seed)
        split = {name: [tuple(ids) for ids in module.split(name)["input_ids"]] for name in ("train", "validation")}
        assert {name: len(rows) for name, rows in split.items()} == {"train": 15, "validation": 5}
        assert len(set(split["train"]) | set(split["validation"])) == 20
        parts.append(split["validation"])
    assert parts[0] == parts[1] != parts[2]


@pytest.mark.parametrize("label", [None, ""])
def test_an_unlabelled_test_file(tiny_bert: str, tmp_path: Path, label: str | None) -> None:
    train = save(tmp_path / "train.jsonl", ROWS)
    test = save(tmp_path / "test.jsonl", [{"text": "good", "label": label}])
    module = ready(tiny_bert, train=train, validation=train, test=test)
    assert not module.has_labelled_test
    assert [set(batch) for batch in module.predict_dataloader()] == [{"input_ids", "attention_mask"}]


def test_other_columns_are_other_data(tiny_bert: str, tmp_path: Path) -> None:
    train = save(tmp_path / "train.csv", ROWS)
    one = ready(tiny_bert, train=train, validation=train)
    two = ready(tiny_bert, train=train, validation=train, text="other")
    assert one.fingerprint != two.fingerprint


# Refusals.


def test_missing_file(tiny_bert: str, tmp_path: Path) -> None:
    train = save(tmp_path / "train.csv", ROWS)
    with pytest.raises(MissingFileError, match=r"no data file at '.*dev.csv'.* Check data.init_args.validation"):
        ready(tiny_bert, train=train, validation=str(tmp_path / "dev.csv"))
    with pytest.raises(MissingFileError, match=r"it is a folder that holds 'train.csv'. Check data.init_args.train"):
        ready(tiny_bert, train=str(tmp_path))
    with pytest.raises(MissingFileError, match=r"nor is there a folder '.*nowhere'"):
        ready(tiny_bert, train=str(tmp_path / "nowhere" / "train.csv"))


def test_unknown_format(tiny_bert: str, tmp_path: Path) -> None:
    path = write(tmp_path / "train.xlsx", "text")
    told = r"from its extension '.xlsx'; allowed are '.csv', '.tsv', '.jsonl', '.parquet', '.txt'"
    with pytest.raises(UnsupportedFormatError, match=told):
        ready(tiny_bert, train=str(path))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("argument", ["text", "text_pair", "label"])
def test_unknown_column(tiny_bert: str, tmp_path: Path, suffix: str, argument: str) -> None:
    train = save(tmp_path / f"train{suffix}", ROWS)
    told = rf"no column 'lable' in '.*'; it has 'text', 'other', 'label'. Did you mean 'label'\? .*init_args.{argument}"
    with pytest.raises(UnknownColumnError, match=told):
        ready(tiny_bert, train=train, **{argument: "lable"})


def test_unknown_label(tiny_bert: str, tmp_path: Path) -> None:
    train = save(tmp_path / "train.csv", ROWS)
    dev = save(tmp_path / "dev.csv", [ROWS[0], {**ROWS[1], "label": "mixed"}])
    with pytest.raises(UnknownLabelError, match=r"dev.csv:3 is labelled 'mixed'; allowed are 'neg', 'neutral', 'pos'"):
        ready(tiny_bert, train=train, validation=dev)


def test_label_id_outside_the_range(tiny_bert: str, tmp_path: Path) -> None:
    train = save(tmp_path / "train.csv", [{"text": "good", "label": label} for label in (0, 1, 2)])
    with pytest.raises(UnknownLabelError, match=r"train.csv:4 is labelled '2'; allowed are 'bad', 'good'"):
        ready(tiny_bert, train=train, label_names=["bad", "good"])


def test_one_missing_label(tiny_bert: str, tmp_path: Path) -> None:
    train = save(tmp_path / "train.parquet", [*ROWS, {**ROWS[0], "label": None}])
    with pytest.raises(UnknownLabelError, match=r"train.parquet:4 is labelled None"):
        ready(tiny_bert, train=train)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_number_that_is_none_is_no_class(tiny_bert: str, tmp_path: Path, suffix: str) -> None:
    rows = [{"text": "good", "label": label} for label in (0.0, 1.0, float("nan"))]
    with pytest.raises(UnknownLabelError, match=r":3 is labelled None; allowed are '0', '1'"):
        ready(tiny_bert, train=save(tmp_path / f"train{suffix}", rows))
    train = save(tmp_path / f"train{suffix}", rows[:2])
    module = ready(tiny_bert, train=train, validation=train, test=save(tmp_path / f"test{suffix}", rows[2:]))
    assert not module.has_labelled_test


@pytest.mark.parametrize("label", [["a", "b"], {"a": 1}])
def test_several_labels_are_none(tiny_bert: str, tmp_path: Path, label: object) -> None:
    train = save(tmp_path / "train.jsonl", [*ROWS, {**ROWS[0], "label": label}])
    with pytest.raises(NotATextError, match=rf"train.jsonl:4 has a {type(label).__name__} in column 'label'; allowed"):
        ready(tiny_bert, train=train)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
@pytest.mark.parametrize("twice", ["text", "label"])
def test_a_column_that_is_there_twice(tiny_bert: str, tmp_path: Path, suffix: str, twice: str) -> None:
    train = save(tmp_path / f"train{suffix}", [{"text": "good", "label": at, "TWICE": 0} for at in range(2)])
    path = Path(train)
    if suffix == ".parquet":
        table = pa.parquet.read_table(path).rename_columns(["text", "label", twice])
        pa.parquet.write_table(table, path)
    else:
        path.write_text(path.read_text().replace("TWICE", twice))
    told = rf"2 columns of '.*' are called '{twice}'.* Rename all but one, or check data.init_args.{twice}\."
    with pytest.raises(DuplicateColumnError, match=told):
        ready(tiny_bert, train=train)


def test_no_labels_at_all(tiny_bert: str, tmp_path: Path) -> None:
    train = save(tmp_path / "train.csv", [{"text": "good", "label": ""}])
    with pytest.raises(MissingLabelsError, match=r"the train split in '.*' has no labels in column 'label'; only the"):
        ready(tiny_bert, train=train)


def test_missing_text(tiny_bert: str, tmp_path: Path) -> None:
    train = save(tmp_path / "train.jsonl", [ROWS[0], {"text": None, "label": "neg"}])
    with pytest.raises(MissingValueError, match=r"train.jsonl:2 has no value in column 'text'"):
        ready(tiny_bert, train=train)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("blank", ["", "  ", "\u00a0"], ids=["empty", "spaces", "no-break"])
def test_rows_without_text_are_refused_in_every_format(tiny_bert: str, tmp_path: Path, suffix: str, blank: str) -> None:
    rows = [*ROWS, {**ROWS[0], "text": blank}]
    place = {".csv": 5, ".tsv": 5, ".jsonl": 4, ".parquet": 4}[suffix]
    with pytest.raises(MissingValueError, match=rf"train{suffix}:{place} has no.* in column 'text'.*empty_texts=skip"):
        ready(tiny_bert, train=save(tmp_path / f"train{suffix}", rows))
    rows = [*ROWS, {**ROWS[0], "other": blank}]
    with pytest.raises(MissingValueError, match=rf"pair{suffix}:{place} has no.* in column 'other'"):
        ready(tiny_bert, train=save(tmp_path / f"pair{suffix}", rows), text_pair="other")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_rows_without_text_are_left_out_if_asked(tiny_bert: str, tmp_path: Path, suffix: str) -> None:
    train = save(tmp_path / f"train{suffix}", [{**ROWS[1], "text": " "}, *ROWS, {**ROWS[0], "other": ""}])
    with pytest.warns(UserWarning, match=rf"left out 2 of 5 rows of '.*train{suffix}' without text, first [12]"):
        module = ready(tiny_bert, train=train, validation=train, text_pair="other", empty_texts="skip")
    assert labels(module, "train") == [2, 0, 1]
    nothing = save(tmp_path / f"nothing{suffix}", [{**ROWS[1], "text": " "}])
    with pytest.raises(EmptyDataError), pytest.warns(UserWarning, match="left out 1 of 1"):
        ready(tiny_bert, train=nothing, empty_texts="skip")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_words_that_look_like_nulls_are_texts(tiny_bert: str, tmp_path: Path, suffix: str) -> None:
    words = ["NA", "null", "None", "nan", "NaN", "N/A", "0"]
    train = save(tmp_path / f"train{suffix}", [{"text": w, "label": at % 2} for at, w in enumerate(words)])
    assert len(ready(tiny_bert, train=train, validation=train).split("train")) == len(words)


def test_a_missing_number_is_no_text(tiny_bert: str, tmp_path: Path) -> None:
    pa.parquet.write_table(pa.table({"text": [1.5, float("nan")], "label": [0, 1]}), tmp_path / "train.parquet")
    with pytest.raises(MissingValueError, match=r"train.parquet:2 has no value in column 'text'"):
        ready(tiny_bert, train=str(tmp_path / "train.parquet"))


def test_a_list_is_no_text(tiny_bert: str, tmp_path: Path) -> None:
    train = save(tmp_path / "train.jsonl", [ROWS[0], {"text": ["a"], "label": "neg"}])
    with pytest.raises(NotATextError, match=r"train.jsonl:2 has a list in column 'text'; allowed are strings and numb"):
        ready(tiny_bert, train=train)


def test_half_a_character_is_no_text(tiny_bert: str, tmp_path: Path) -> None:
    lines = ['{"text": "good", "label": 0}', r'{"text": "bad \ud83d", "label": 1, "other": "\ud83d"}']
    train = str(write(tmp_path / "train.jsonl", "\n".join(lines)))
    with pytest.raises(MalformedLineError, match=r"train.jsonl:2 has half a character in column 'text': 'bad \\ud83d'"):
        ready(tiny_bert, train=train)
    write(tmp_path / "train.jsonl", "\n".join(lines).replace(r"bad \ud83d", r"bad \ud83d\ude00"))
    assert ready(tiny_bert, train=train, validation=train).split("train").num_rows == 2


# Without a training split.


def running(module: TextFiles, verb: str) -> TextFiles:
    """The datamodule as a trainer hands it to a verb."""
    module.trainer = SimpleNamespace(  # type: ignore[assignment]
        state=SimpleNamespace(fn=TrainerFn(verb)), distributed_sampler_kwargs=None, overfit_batches=0
    )
    return module


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet", ".txt"])
def test_new_texts_are_all_that_predict_reads(tiny_bert: str, tmp_path: Path, suffix: str) -> None:
    if suffix == ".txt":
        new = str(write(tmp_path / "new.txt", "good film\nthe film\n"))
    else:
        new = save(tmp_path / f"new{suffix}", [{"other": "awful", "text": text} for text in ("good film", "the film")])
    module = TextFiles(tiny_bert, train=str(tmp_path / "missing.csv"), predict=new, max_length=32)
    running(module, "predict").prepare_data()
    module.setup("predict")
    assert not module.knows_target
    first = 1 if suffix in (".txt", ".jsonl", ".parquet") else 2
    rows = module.predicted_rows()
    assert rows is not None
    assert list(rows) == [{"text": "good film", "row": first}, {"text": "the film", "row": first + 1}]
    (batch,) = module.predict_dataloader()
    assert set(batch) == {"input_ids", "attention_mask"}
    assert [module.load_tokenizer().decode(ids) for ids in batch["input_ids"]] == [
        "[CLS] good film [SEP]",
        "[CLS] the film [SEP]",
    ]


def test_a_labelled_test_file_alone_takes_its_classes_from_the_model(tiny_bert: str, tmp_path: Path) -> None:
    test = save(tmp_path / "test.csv", ROWS)
    with pytest.raises(UnknownClassesError, match=r"test split in '.*test.csv' is labelled.*--ckpt_path.*label_names"):
        ready(tiny_bert, test=test)
    for names in (("pos", "neutral", "neg"), ("neg", "neutral", "pos")):
        module = TextFiles(tiny_bert, test=test, max_length=32)
        assert module.lacks_target
        module.adopt_target(TargetSpec("reviews", "classification", names, ("f1", "accuracy"), "f1"))
        module.setup()
        assert labels(module, "test") == [names.index(str(row["label"])) for row in ROWS]
        assert (module.target.label_names, module.target.score) == (names, "f1")
        assert module.has_labelled_test
    assert labels(ready(tiny_bert, test=test, label_names=["pos", "neg", "neutral"]), "test") == [0, 1, 2]
    with pytest.raises(TargetKindError, match="'TextFiles' is a classification data set"):
        TextFiles(tiny_bert, test=test).adopt_target(TargetSpec("ner", "token_classification", ("O", "B-X")))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet", ".txt"])
def test_texts_alone_will_do_to_calibrate_on(tiny_bert: str, tmp_path: Path, suffix: str) -> None:
    if suffix == ".txt":
        train = str(write(tmp_path / "train.txt", "good film\nthe film\n"))
    else:
        train = save(tmp_path / f"train{suffix}", [{"text": text, "other": "x"} for text in ("good film", "the film")])
    dev = save(tmp_path / "dev.csv", ROWS)
    target = TargetSpec("reviews", "classification", ("pos", "neutral", "neg"))
    module = running(TextFiles(tiny_bert, train=train, validation=dev, max_length=32), "validate")
    with pytest.raises(UnknownClassesError, match=r"validation split in '.*' is labelled, and without a labelled"):
        module.prepare_data()
    assert module.lacks_target
    module.adopt_target(target)
    module.prepare_data()
    module.setup()
    assert labels(module, "validation") == [0, 2, 1]
    assert [set(batch) for batch in module.calibration_batches(2)] == [{"input_ids", "attention_mask"}]
    told = "no column 'label'" if suffix != ".txt" else "it has 'text'"
    with pytest.raises(UnknownColumnError, match=told):
        running(TextFiles(tiny_bert, train=train, validation=dev), "fit").prepare_data()
    with pytest.raises(UnknownColumnError, match=told):  # a part of it would be the validation split
        running(TextFiles(tiny_bert, train=train), "validate").prepare_data()


def test_the_classes_of_a_training_split_count_where_it_is_there(tiny_bert: str, tmp_path: Path) -> None:
    train = save(tmp_path / "train.csv", ROWS)
    module = running(TextFiles(tiny_bert, train=train, validation=train, max_length=32), "validate")
    assert not module.lacks_target
    module.prepare_data()
    module.setup()
    assert module.target.label_names == ("neg", "neutral", "pos")


@pytest.mark.parametrize(("verb", "read"), [("validate", "validation"), ("test", "test"), ("predict", "test")])
def test_files_that_a_verb_does_not_read_need_not_be_there(
    tiny_bert: str, tmp_path: Path, verb: str, read: str, caplog: pytest.LogCaptureFixture
) -> None:
    files = {split: str(tmp_path / f"{split}.csv") for split in ("train", "validation", "test")}
    save(tmp_path / f"{read}.csv", ROWS)
    module = running(TextFiles(tiny_bert, **files, max_length=32), verb)  # type: ignore[arg-type]
    with pytest.raises(MissingFileError, match=r"train.csv.* Check data.init_args.train"):
        module.prepare_data()  # nothing tells the classes
    assert module.lacks_target
    module.adopt_target(TargetSpec("reviews", "classification", ("pos", "neutral", "neg")))
    with caplog.at_level("INFO"):
        module.prepare_data()
    assert "TextFiles: goes on without the train split: no data file at" in caplog.text
    module.setup()
    assert labels(module, read) == [0, 2, 1]
    with pytest.raises(MissingFileError, match=r"no data file at '.*train.csv'.* Check data.init_args.train"):
        module.calibration_batches(4)
    with pytest.raises(MissingFileError, match=r"train.csv"):
        running(module, "fit").prepare_data()
    save(tmp_path / "train.csv", ROWS)
    running(module, verb).prepare_data()
    module.setup()
    assert module.calibration_batches(4).num_samples == 3
    Path(files[read]).unlink()
    with pytest.raises(MissingFileError, match=rf"{read}.csv"):
        running(TextFiles(tiny_bert, **files, max_length=32), verb).prepare_data()  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["train", "predict", None])
def test_every_process_ends_with_the_same_message(tiny_bert: str, tmp_path: Path, path: str | None) -> None:
    """One that ended in `prepare_data`, which the others wait for, would leave them with a broken connection."""
    files: dict[str, Any] = {} if path is None else {path: save(tmp_path / "a.csv", [{"other": "good", "label": 0}])}
    module = running(TextFiles(tiny_bert, **files), "predict" if path == "predict" else "fit")
    error = MissingSplitError if path is None else UnknownColumnError
    with pytest.raises(error):
        module.prepare_data()
    module.trainer.distributed_sampler_kwargs = {"rank": 0, "num_replicas": 2}  # type: ignore[union-attr,misc]
    module.prepare_data()
    with pytest.raises(error):
        module.setup()


def test_what_test_scores_is_told(tiny_bert: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = save(tmp_path / "train.csv", ROWS)
    for name, warned in (("labelled", False), ("typo", True), (None, False)):
        rows = ROWS if name == "labelled" else [{"text": "good", "lable": "pos"}]
        test = None if name is None else save(tmp_path / f"{name}.csv", rows)
        module = running(ready(tiny_bert, train=train, validation=train, test=test), "test")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            caplog.clear()
            with caplog.at_level("INFO"):
                loader = module.test_dataloader()
        assert sum("what test scores is the validation split" in str(one.message) for one in caught) == warned
        assert ("what test scores is the validation split" in caplog.text) == (name is None)
        assert module.describe()["scored"] == ("test" if name == "labelled" else "validation")
        assert sum(len(batch["labels"]) for batch in loader) == 3
    assert "scored" not in running(module, "fit").describe()
    module = running(ready(tiny_bert, test=save(tmp_path / "typo.csv", [{"text": "good", "lable": "pos"}])), "test")
    with (
        warnings.catch_warnings(action="error"),
        pytest.raises(
            MissingSplitError, match=r"the test split needs labels in column 'label', see data.init_args.label\."
        ),
    ):
        module.test_dataloader()
    module = running(
        ready(tiny_bert, test=save(tmp_path / "ok.csv", ROWS), label_names=["neg", "neutral", "pos"]), "test"
    )
    with pytest.raises(MissingSplitError, match=r"have 'test'\. Give data.init_args.validation\."):
        module.val_dataloader()


def test_splits_that_are_not_there(tiny_bert: str, tmp_path: Path) -> None:
    test = save(tmp_path / "test.csv", ROWS)
    with pytest.raises(MissingSplitError, match="the data have no train split; they have 'test'"):
        running(TextFiles(tiny_bert, test=test), "fit").prepare_data()
    with pytest.raises(MissingSplitError, match="no validation or test split; they have none"):
        running(TextFiles(tiny_bert, predict=test), "validate").prepare_data()
    module = ready(tiny_bert, test=test, label_names=["neg", "neutral", "pos"])
    with pytest.raises(MissingSplitError, match="no train split"):
        module.calibration_batches(4)
    with pytest.raises(MissingSplitError, match="no validation split"):
        module.val_dataloader()


def test_not_a_number(tiny_bert: str, tmp_path: Path) -> None:
    train = save(tmp_path / "train.csv", ROWS)
    with pytest.raises(NotANumberError, match=r"train.csv:2 has the regression target 'pos'; allowed are finite"):
        ready(tiny_bert, train=train, kind="regression")


def test_one_class(tiny_bert: str, tmp_path: Path) -> None:
    train = save(tmp_path / "train.csv", ROWS[:1] * 3)
    with pytest.raises(SingleClassError, match=r"all 3 training samples of '.*' are labelled 'pos'; at least two"):
        ready(tiny_bert, train=train)


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        *((suffix, content) for suffix in (".csv", ".tsv", ".jsonl") for content in ("", "\n", "\n\n", "\ufeff")),
        (".csv", "text,label\n"),
        (".tsv", "text\tlabel\n"),
        (".jsonl", "{}\n"),
    ],
)
def test_empty_file(tiny_bert: str, tmp_path: Path, suffix: str, content: str) -> None:
    with pytest.raises(EmptyDataError, match="no samples in"):
        ready(tiny_bert, train=str(write(tmp_path / f"train{suffix}", content)))


def test_empty_parquet(tiny_bert: str, tmp_path: Path) -> None:
    pa.parquet.write_table(pa.table({}), tmp_path / "train.parquet")
    with pytest.raises(EmptyDataError, match="no samples in"):
        ready(tiny_bert, train=str(tmp_path / "train.parquet"))


@pytest.mark.parametrize("rows", [1, 2, 10])
def test_a_part_can_be_set_aside_from_two_rows_on(tiny_bert: str, tmp_path: Path, rows: int) -> None:
    train = save(tmp_path / "train.csv", [{"text": "good", "label": at} for at in range(rows)])
    arguments: dict[str, Any] = {"train": train, "kind": "regression", "validation_fraction": 0.99}
    if rows > 1:
        module = ready(tiny_bert, **arguments)
        assert (len(module.split("train")), len(module.split("validation"))) == (1, rows - 1)
        return
    told = r"1 sample\(s\) in '.*train.csv'; at least 2 are needed to train on .* data.init_args.validation"
    with pytest.raises(TooFewSamplesError, match=told):
        ready(tiny_bert, **arguments)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("t.csv", 'text,label\n"good,\nfilm",a\nbad\n', r"t.csv:4 has 1 column\(s\); expected 2: text, label"),
        ("t.tsv", "text\tlabel\ngood\ta\nbad\n", r"t.tsv:3 has 1 column\(s\); .* Correct the line.$"),
        ("t.csv", 'text,label\ngood,a\n"bad"x,b\n', r"t.csv:3 has a quoting error"),
        ("t.jsonl", '{"text": "a", "label": 1}\n{"text": \n', r"t.jsonl:2 has no valid JSON \(.*\); expected one JSON"),
        ("t.jsonl", "[1, 2]\n", r"t.jsonl:1 has a JSON list; expected one JSON object. Correct or remove the line"),
    ],
)
def test_malformed_lines(tiny_bert: str, tmp_path: Path, name: str, content: str, told: str) -> None:
    with pytest.raises(MalformedLineError, match=told):
        ready(tiny_bert, train=str(write(tmp_path / name, content)))


def test_malformed_parquet(tiny_bert: str, tmp_path: Path) -> None:
    with pytest.raises(MalformedFileError, match=r"cannot read '.*t.parquet' as PARQUET"):
        ready(tiny_bert, train=str(write(tmp_path / "t.parquet", "text,label\n")))


def test_a_damaged_page_of_parquet(tiny_bert: str, tmp_path: Path) -> None:
    path = Path(save(tmp_path / "t.parquet", ROWS))
    content = bytearray(path.read_bytes())
    content[4:80] = b"\xff" * 76
    path.write_bytes(content)
    with pytest.raises(MalformedFileError, match=r"cannot read '.*t.parquet' as PARQUET"):
        ready(tiny_bert, train=str(path))


def test_not_utf8(tiny_bert: str, tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "text,label\né,1\n", encoding="latin-1")
    with pytest.raises(EncodingError, match=r"byte 0xe9 at offset 11; expected UTF-8"):
        ready(tiny_bert, train=str(path))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"metrics": ["pearson"]}, "metrics='pearson'; allowed is for classification any of accuracy, f1, matthews"),
        ({"metrics": ["f1"], "kind": "regression"}, "allowed is for regression any of pearson, spearman"),
        ({"label_names": ["a", "a"]}, r"label_names=\['a', 'a'\]; allowed is two or more names, all different. Check"),
        (
            {"label_names": ["a", "b"], "kind": "regression"},
            "allowed is null for kind='regression', which",
        ),
        ({"label_names": ["a"]}, r"label_names=\['a'\]; allowed is two or more names, all different"),
        ({"kind": "regresion"}, "kind='regresion'; allowed is 'classification', 'regression'"),
        ({"empty_texts": "drop"}, "empty_texts='drop'; allowed is 'error', 'skip'"),
        ({"label": None}, "label=None; allowed is the name of a column"),
        ({"validation_fraction": 1.0}, "validation_fraction=1.0; allowed is above 0 and below 1"),
    ],
)
def test_arguments_that_make_no_sense(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ArgumentRangeError, match=told):
        TextFiles("any", train="train.csv", **arguments)
