from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_pl.data import CoNLL
from lowrank_pl.data.conll import aligned, read_conll, to_bio
from lowrank_pl.errors.data import EmptyDataError
from lowrank_pl.errors.data_files import MalformedLineError
from lowrank_pl.errors.labels import BadTagError, SingleClassError, UnknownLabelError
from tests.data.samples import write

TRAIN = """-DOCSTART- -X- -X- O

good NN B-NP B-PER
films NN I-NP I-PER
is VB B-VP O

the DT B-NP O
plot\tNN\tI-NP\tB-LOC
"""


def ready(tokenizer: str, folder: Path, train: str = TRAIN, dev: str | None = None, **arguments: Any) -> CoNLL:
    files = {"train": train, "validation": dev or train}
    paths = {split: str(write(folder / f"{split}.txt", content)) for split, content in files.items()}
    module = CoNLL(tokenizer, **{**paths, "max_length": 16, **arguments})
    module.prepare_data()
    module.setup()
    return module


def test_tags_go_to_the_first_piece_of_their_word(tiny_bert: str, tmp_path: Path) -> None:
    module = ready(tiny_bert, tmp_path)
    assert module.target.kind == "token_classification"
    assert module.target.label_names == ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
    assert module.target.metrics == ("entity_f1",)
    pieces = module.load_tokenizer().convert_ids_to_tokens(module.split("train")["input_ids"][0])
    assert pieces == ["[CLS]", "good", "film", "##s", "is", "[SEP]"]
    assert module.split("train")["labels"][:] == [[-100, 3, 4, -100, 0, -100], [-100, 0, 1, -100]]


def test_labels_are_padded_with_the_inputs(tiny_bert: str, tmp_path: Path) -> None:
    batch = next(iter(ready(tiny_bert, tmp_path).val_dataloader()))
    assert batch["labels"].shape == batch["input_ids"].shape == (2, 6)
    assert batch["labels"].dtype == torch.long
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_alignment_by_hand() -> None:
    assert aligned([None, 0, 0, 1, 2, 2, None], [5, 6, 7]) == [-100, 5, -100, 6, 7, -100, -100]


def test_truncated_sentences_keep_their_alignment(tiny_bert: str, tmp_path: Path) -> None:
    train = "".join(f"films NN O {tag}\n" for tag in ["B-PER", "I-PER"] * 5)
    with pytest.warns(UserWarning, match=r"1 of 1 train samples \(100.0%\) were cut at max_length=8; .* 22 tokens"):
        module = ready(tiny_bert, tmp_path, train, max_length=8)
    assert module.split("train")["labels"][0] == [-100, 1, -100, 2, -100, 1, -100, -100]


def test_every_word_has_a_tag_though_a_tokenizer_leaves_nothing_of_it(tiny_bert: str, tmp_path: Path) -> None:
    module = ready(tiny_bert, tmp_path, "good B-PER\n\u200b I-PER\nfilm O\n\ufe0f B-PER\n\n")
    assert module.split("train")["labels"][0] == [-100, 1, 2, 0, 1, -100]
    pieces = module.load_tokenizer().convert_ids_to_tokens(module.split("train")["input_ids"][0])
    assert pieces == ["[CLS]", "good", "[UNK]", "film", "[UNK]", "[SEP]"]


@pytest.mark.parametrize(
    ("tags", "bio"),
    [
        ("O B-A I-A O", "O B-A I-A O"),
        ("I-A I-A O I-B", "B-A I-A O B-B"),
        ("I-A B-A I-A", "B-A B-A I-A"),
        ("I-A I-B", "B-A B-B"),
        ("B-A I-B", "B-A B-B"),
    ],
)
def test_iob1_becomes_bio(tags: str, bio: str) -> None:
    assert to_bio(tags.split()) == bio.split()
    assert to_bio(bio.split()) == bio.split()


def test_conversion_is_told(tiny_bert: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"1 entities of '.*train.txt' begin with I-: read as IOB1"):
        module = ready(tiny_bert, tmp_path, "good I-PER\nfilm I-PER\n\n", TRAIN.replace("LOC", "PER"))
    assert module.split("train")["labels"][:] == [[-100, 1, 2, -100]]


def test_columns_can_be_chosen(tmp_path: Path) -> None:
    path = write(tmp_path / "t.txt", TRAIN)
    assert [sentence.tags for sentence in read_conll(path, tag_column=2)] == [
        ["B-NP", "I-NP", "B-VP"],
        ["B-NP", "I-NP"],
    ]
    with pytest.raises(BadTagError, match=r"t.txt:3 has the tag 'NN'; allowed are 'O', 'B-<type>' and 'I-<type>'"):
        read_conll(path, tag_column=-3)


def test_words_may_hold_other_spaces(tmp_path: Path) -> None:
    path = write(tmp_path / "t.txt", "10\u00a0000  O\r\n\r\n\u2028 O\r\n")
    assert [sentence.words for sentence in read_conll(path)] == [["10\u00a0000"], ["\u2028"]]


@pytest.mark.parametrize(("columns", "least"), [({}, 2), ({"tag_column": 3}, 4), ({"tag_column": -3}, 3)])
def test_missing_column(tmp_path: Path, columns: dict[str, int], least: int) -> None:
    path = write(tmp_path / "t.txt", "good O O O\nfilm\n")
    told = rf"t.txt:2 has 1 column\(s\): 'film'; expected at least {least}, for token_column=0 and tag_column="
    with pytest.raises(MalformedLineError, match=told):
        read_conll(path, **columns)


def test_tags_of_another_scheme(tmp_path: Path) -> None:
    with pytest.raises(BadTagError, match=r"t.txt:2 has the tag 'E-PER'.* or convert the file to BIO"):
        read_conll(write(tmp_path / "t.txt", "good B-PER\nfilm E-PER\n"))


def test_unknown_tag(tiny_bert: str, tmp_path: Path) -> None:
    told = r"validation.txt:2 is labelled 'B-ORG'; allowed are 'O', 'B-LOC', 'I-LOC', 'B-PER', 'I-PER'"
    with pytest.raises(UnknownLabelError, match=told):
        ready(tiny_bert, tmp_path, TRAIN, "good O\nfilm B-ORG\n")


def test_nothing_but_o(tiny_bert: str, tmp_path: Path) -> None:
    with pytest.raises(SingleClassError, match=r"all 2 training samples of '.*' are labelled 'O'"):
        ready(tiny_bert, tmp_path, "good O\nfilm O\n")


def test_no_sentences(tmp_path: Path) -> None:
    with pytest.raises(EmptyDataError, match="no samples in"):
        read_conll(write(tmp_path / "t.txt", "-DOCSTART- O\n\n\n"))


def test_byte_level_tokenizers_get_words_with_their_space(tiny_bert: str, tmp_path: Path) -> None:
    from tokenizers import pre_tokenizers

    module = CoNLL(tiny_bert, str(tmp_path / "a"), str(tmp_path / "b"), max_length=16)
    tokenizer: Any = super(CoNLL, module).load_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert module.load_tokenizer().backend_tokenizer.pre_tokenizer.add_prefix_space is True
