import json

import pytest

from lowrank_pl.surgery import CompressionRecord, LayerRecord


def record() -> CompressionRecord:
    layers = (
        LayerRecord("a", 8, 8, 2, "low_rank", 32, 0.5, 0.25),
        LayerRecord("b", 4, 8, 4, "dense", 32, 0.0),
    )
    return CompressionRecord("FWSVD", {"side": "input", "overrides": []}, layers, ("a note",))


def test_counts_and_ratio() -> None:
    assert record().targeted_dense == 64 + 32
    assert record().targeted_kept == 32 + 32
    assert record().keep_ratio == pytest.approx(2 / 3)


def test_a_record_without_layers_keeps_everything() -> None:
    assert CompressionRecord("NoCompression").keep_ratio == 1.0


def test_round_trip_through_json() -> None:
    fields = json.loads(json.dumps(record().to_dict()))
    assert CompressionRecord.from_dict(fields) == record()
