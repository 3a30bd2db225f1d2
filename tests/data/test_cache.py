from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset, concatenate_datasets, load_from_disk

from lowrank_pl.data.cache import cache_root, dataset_digest, tokenizer_digest, tree_digest, written_whole
from tests.data.samples import write
from tests.support.tiny import tiny_tokenizer


def test_content_counts_and_chunks_do_not(tmp_path: Path) -> None:
    whole = Dataset.from_dict({"ids": [[1], [2, 3], [4]], "labels": [0, 1, 2]})
    parts = concatenate_datasets([whole.select([0]), whole.select([1, 2])])
    whole.save_to_disk(str(tmp_path / "saved"))
    same = [whole, parts, whole.select([2, 1, 0]).select([2, 1, 0]), load_from_disk(str(tmp_path / "saved"))]
    assert len({dataset_digest(dataset) for dataset in same}) == 1
    other = [
        Dataset.from_dict({"ids": [[1], [2], [3, 4]], "labels": [0, 1, 2]}),
        Dataset.from_dict({"ids": [[1], [2, 3], [4]], "labels": [0, 1, 3]}),
        whole.select([1, 0, 2]),
        whole.rename_column("labels", "label"),
    ]
    assert len({dataset_digest(dataset) for dataset in [whole, *other]}) == 5


def test_a_tokenizer_is_what_it_does_not_what_it_did() -> None:
    tokenizer = tiny_tokenizer()
    before = tokenizer_digest(tokenizer)
    tokenizer(["good film", "bad"], truncation=True, max_length=4, padding=True)
    assert tokenizer_digest(tokenizer) == before
    tokenizer.add_tokens(["great film"])
    assert tokenizer_digest(tokenizer) != before


def test_changed_sources_are_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.py", "x = 1")
    before = tree_digest([path])
    assert tree_digest([path]) == before
    write(path, "x = 10")
    assert tree_digest([path]) != before


def test_the_first_of_two_writers_wins(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "entry"
    with written_whole(folder) as late:
        write(late / "who", "late")
        with written_whole(folder) as early:
            write(early / "who", "early")
    assert (folder / "who").read_text() == "early"
    assert [path.name for path in folder.parent.iterdir()] == ["entry"]


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_root("~/somewhere") == Path.home() / "somewhere"
    monkeypatch.setenv("LOWRANK_PL_CACHE", str(tmp_path))
    assert cache_root(None) == tmp_path / "data"
    monkeypatch.delenv("LOWRANK_PL_CACHE")
    assert cache_root(None) == Path.home() / ".cache" / "lowrank_pl" / "data"
