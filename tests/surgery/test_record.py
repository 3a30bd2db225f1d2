import json

import pytest

from lowrank_pl.core import LinearShape
from lowrank_pl.nn import LowRankLinear, SVDLinear
from lowrank_pl.surgery import CompressionRecord, CostRecord, LayerRecord


def record() -> CompressionRecord:
    layers = (
        LayerRecord("a", 8, 8, 2, "low_rank", 32, 0.5, 0.25),
        LayerRecord("b", 4, 8, 4, "dense", 32, 0.0),
    )
    return CompressionRecord(
        "FWSVD", {"side": "input", "overrides": []}, layers, ("a note",), cost=CostRecord("ns", 30, 40)
    )


def test_counts_and_ratio() -> None:
    assert record().targeted_dense == 64 + 32
    assert record().targeted_kept == 32 + 32
    assert record().keep_ratio == pytest.approx(2 / 3)


def test_a_record_without_layers_keeps_everything() -> None:
    assert CompressionRecord("NoCompression").keep_ratio == 1.0


def test_round_trip_through_json() -> None:
    fields = json.loads(json.dumps(record().to_dict()))
    assert CompressionRecord.from_dict(fields) == record()


def test_a_layers_record_takes_its_cost_from_its_form() -> None:
    shape = LinearShape(8, 4)
    assert LayerRecord.of("a", shape, None) == LayerRecord("a", 8, 4, 4, "dense", 32)
    told = LayerRecord("a", 8, 4, 2, "low_rank", 24, 0.5, 0.25)
    assert LayerRecord.of("a", shape, 2, error=0.5, weighted_error=0.25) == told
    assert LayerRecord.of("a", shape, {"rank": 2}, LowRankLinear, error=0.5, weighted_error=0.25) == told
    groups = LayerRecord("a", 8, 4, 3, "singular_groups", 3 * (8 + 4 + 1))
    assert LayerRecord.of("a", shape, {"capacity": 3}, SVDLinear) == groups


def test_the_cost_is_told_in_its_own_unit_and_may_be_missing() -> None:
    cost = record().cost
    assert cost is not None
    assert cost.to_dict() == {"unit": "ns", "kept": 30, "dense": 40, "ratio": 0.75}
    fields = record().to_dict()
    del fields["cost"]  # as files of earlier releases
    assert CompressionRecord.from_dict(fields).cost is None
