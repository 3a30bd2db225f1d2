"""Every picture can be read, from one block to twenty-four, with the long names of real encoders."""

from __future__ import annotations

import pytest

from lowrank_pl.core import LinearShape
from lowrank_pl.core.diagnosis import BOTH, ELEMENTWISE, INPUT, KRONECKER, OUTPUT, SVD, Diagnosis
from lowrank_pl.monitoring import rank_heatmap
from lowrank_pl.monitoring.diagnosis_report import diagnosis_figure
from lowrank_pl.monitoring.rank_flow import flow_figure
from lowrank_pl.strategies import RankPlan, Reallocation
from lowrank_pl.surgery import LayerRecord
from tests.support.pictures import faults

ATTENTION = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
KINDS = {**dict.fromkeys(ATTENTION, (768, 768)), "intermediate.dense": (3072, 768), "output.dense": (768, 3072)}


def shapes(blocks: int) -> dict[str, LinearShape]:
    names = [(f"roberta.encoder.layer.{block}.{kind}", size) for block in range(blocks) for kind, size in KINDS.items()]
    return {name: LinearShape(*size) for name, size in names}


@pytest.mark.parametrize("blocks", [1, 24])
def test_the_diagnosis(blocks: int) -> None:
    objective = {SVD: 0.5, INPUT: 0.4, OUTPUT: 0.3, BOTH: 0.2, ELEMENTWISE: 0.1}
    found = Diagnosis(1e-9, 120.0, 30.0, 0.9, objective, objective, BOTH)
    if blocks > 1:
        found = found.judged({**objective, KRONECKER: 1e-6})
    assert faults(diagnosis_figure(dict.fromkeys(shapes(blocks), found))) == []


@pytest.mark.parametrize("layers", [1, 6, 144])
def test_the_ranks(layers: int) -> None:
    some = list(shapes(24).items())[:layers]
    records = [LayerRecord(name, s.out_features, s.in_features, 500, "low_rank", 768_000) for name, s in some]
    assert faults(rank_heatmap(records)) == []


def test_the_ranks_of_an_encoder_and_a_decoder_stand_beside_each_other() -> None:
    """Blocks of both have the same numbers and kinds; drawn on top of each other neither could be read."""
    stacks = [f"{stack}.block.{block}.layer.0.SelfAttention.q" for stack in ("encoder", "decoder") for block in (0, 1)]
    records = [LayerRecord(name, 64, 64, 8 + at, "low_rank", 1024) for at, name in enumerate(stacks)]
    figure = rank_heatmap(records)
    assert faults(figure) == []
    rows = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert rows == ["encoder.block 0", "encoder.block 1", "decoder.block 0", "decoder.block 1"]
    places = {text.get_text(): text.get_position() for text in figure.axes[0].texts}
    assert places == {str(8 + row): (0, row) for row in range(4)}


def test_the_flow_of_ranks() -> None:
    layers = shapes(12)
    full = {name: shape.full_rank for name, shape in layers.items()}
    plan = RankPlan(1000, layers, full)
    history = [Reallocation(step, 0.9 * plan.dense_cost, plan.dense_cost, full) for step in range(1, 20)]
    assert faults(flow_figure(plan, history, 100)) == []
