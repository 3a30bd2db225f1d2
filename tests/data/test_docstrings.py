from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lowrank_pl.data import Docstrings
from lowrank_pl.data.docstring_harvest import Sentence
from lowrank_pl.data.docstrings import balanced
from lowrank_pl.errors.data import ArgumentRangeError, EmptyDataError, TooFewPackagesError
from tests.data.samples import big_package, module, write


def ready(tokenizer: str, **arguments: Any) -> Docstrings:
    data = Docstrings(tokenizer, **{"max_length": 32, **arguments})
    data.prepare_data()
    data.setup()
    return data


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "site"
    big_package(folder, "bravolib", 150)
    big_package(folder, "charlielib", 60)
    monkeypatch.syspath_prepend(str(folder))
    return folder


def test_classes_are_packages(tiny_bert: str, packages: Path) -> None:
    data = ready(tiny_bert, packages=["bravolib", "charlielib"], max_per_class=100)
    assert data.target.label_names == ("bravolib", "charlielib")
    assert (data.target.kind, data.target.metrics) == ("classification", ("accuracy",))
    labels = [label for split in ("train", "validation", "test") for label in data.split(split)["labels"]]
    assert (labels.count(0), labels.count(1)) == (100, 60)
    assert data.has_labelled_test


def test_no_sentence_is_in_two_splits(tiny_bert: str, packages: Path) -> None:
    data = ready(tiny_bert, packages=["bravolib", "charlielib"])
    rows = [tuple(ids) for split in ("train", "validation", "test") for ids in data.split(split)["input_ids"]]
    assert len(rows) == len(set(rows)) == 210


def test_another_version_of_a_package_is_read_anew(tiny_bert: str, packages: Path) -> None:
    arguments: dict[str, Any] = {"packages": ["bravolib", "charlielib"]}
    one = ready(tiny_bert, **arguments)
    assert ready(tiny_bert, **arguments).fingerprint == one.fingerprint
    big_package(packages, "charlielib", 61)
    assert ready(tiny_bert, **arguments).fingerprint != one.fingerprint


def test_packages_in_another_order_are_other_labels(tiny_bert: str, packages: Path) -> None:
    for names in (["bravolib", "charlielib"], ["charlielib", "bravolib"]):
        assert ready(tiny_bert, packages=names).target.label_names == tuple(names)


def test_balance_does_not_depend_on_order_or_on_other_packages() -> None:
    sentences = [Sentence(package, f"{package}.f{at}", f"text {at}") for package in "ab" for at in range(50)]
    kept = balanced(sentences, 10)
    assert [sum(s.package == package for s in kept) for package in "ab"] == [10, 10]
    assert balanced(sentences[::-1], 10) == kept
    assert balanced(sentences[:50], 10) == [s for s in kept if s.package == "a"]
    assert kept[:10] != sentences[:10]
    assert set(kept) < set(balanced(sentences, 20))


def test_one_package_is_too_few(tiny_bert: str, packages: Path) -> None:
    told = r"docstrings of 1 package\(s\) found \('bravolib'\) of the asked 'bravolib'; at least two are needed"
    with pytest.raises(TooFewPackagesError, match=told):
        ready(tiny_bert, packages=["bravolib"])
    write(packages / "emptylib" / "__init__.py", "")
    with pytest.raises(TooFewPackagesError, match=r"found \('bravolib'\) of the asked 'bravolib', 'emptylib'"):
        ready(tiny_bert, packages=["bravolib", "emptylib"])


def test_too_few_sentences_for_three_splits(tiny_bert: str, packages: Path) -> None:
    for name in ("deltalib", "echolib"):
        write(packages / name / "__init__.py", module({"one": f"Says something about {name[0]} here."}))
    with pytest.raises(EmptyDataError, match=r"no samples in '\w+ split of the docstrings of deltalib, echolib'"):
        ready(tiny_bert, packages=["deltalib", "echolib"])


def test_max_per_class() -> None:
    with pytest.raises(ArgumentRangeError, match="max_per_class=0; allowed is 1 or more"):
        Docstrings("any", max_per_class=0)
