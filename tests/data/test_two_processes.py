"""Evaluation in two processes over gloo, on splits that they cannot halve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data import two_processes
from tests.data.samples import write_sst2
from tests.support.forks import Forks


def test_an_odd_split_is_scored_as_in_one_process(everything_loaded: Forks, tiny_bert: str, tmp_path: Path) -> None:
    data = write_sst2(tmp_path / "sst2", validation=15, test=5)
    found: dict[int, list[dict[str, Any]]] = {}
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        folder.mkdir()
        if devices == 1:
            two_processes.run(folder, tiny_bert, str(data), devices)
        else:
            words = [str(two_processes.__file__), str(folder), tiny_bert, str(data), str(devices)]
            assert "replicates" not in everything_loaded.run(words, tmp_path, processes=2)
        found[devices] = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(devices)]
    (one,) = found[1]
    assert [sum(rank["batches"]) for rank in found[2]] == [8, 7]
    assert [sum(rank["fit"]) for rank in found[2]] == [8, 7]
    for rank in found[2]:
        assert rank["accuracy"] == one["accuracy"]
        assert rank["loss"] == pytest.approx(one["loss"], abs=1e-6)
    texts = [line.split("\t")[1] for line in (data / "test.tsv").read_text().splitlines()[1:]]
    for run, name in (("1", "predictions"), ("2", "predictions-0"), ("2", "predictions-1")):
        for line in (tmp_path / run / f"{name}.jsonl").read_text().splitlines():
            row = json.loads(line)
            assert row["text"] == texts[row["index"]]
            assert row["probability"] == max(row["probabilities"].values())
    whole = predictions(tmp_path / "1" / "predictions.jsonl")
    shares = [predictions(tmp_path / "2" / f"predictions-{rank}.jsonl") for rank in (0, 1)]
    assert [list(share) for share in shares] == [[0, 2, 4], [1, 3]]
    assert list(whole) == [0, 1, 2, 3, 4]
    for index, logits in {**shares[0], **shares[1]}.items():
        assert logits == pytest.approx(whole[index], abs=1e-5)


def predictions(path: Path) -> dict[int, list[float]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["index"]: row["logits"] for row in rows}
