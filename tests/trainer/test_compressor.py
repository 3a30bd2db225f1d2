"""What is refused before a model is scored, although it takes the model or the data to see it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lowrank_pl.errors import LowRankError
from lowrank_pl.errors.data_files import MissingSplitError
from lowrank_pl.errors.numerics import MemoryBoundError
from lowrank_pl.errors.outputs import BlocksMismatchError
from lowrank_pl.errors.targets import HeadError
from lowrank_pl.strategies import SVD, Calibration, KroneckerSVD, Recalibration
from lowrank_pl.tasks import CausalLM
from tests.strategies.test_finished_blocks import filled
from tests.support.runs import make_trainer
from tests.support.tiny import save_tiny_decoder
from tests.tasks.test_causal_lm import corpus


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_decoder("llama", tmp_path_factory.mktemp("llama") / "model"))


CASES: list[tuple[Any, type[LowRankError]]] = [
    (KroneckerSVD(keep_ratio=0.5, calibration=Calibration(max_memory=1e-6)), MemoryBoundError),
    (KroneckerSVD(keep_ratio=0.5, calibration=Calibration(max_memory=1e-6), sequential=True), MemoryBoundError),
    (SVD(keep_ratio=0.5, recalibration=Recalibration()), HeadError),
    (KroneckerSVD(keep_ratio=0.5, sequential=True), BlocksMismatchError),
]


def test_compress_refuses_before_it_scores(llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def score(*_: Any) -> None:
        raise AssertionError("the model was scored")

    monkeypatch.setattr(CausalLM, "validation_step", score)
    filled(tmp_path / "out.blocks")
    data, out = corpus(tmp_path, llama), str(tmp_path / "out")
    for strategy, error in CASES:
        with pytest.raises(error):
            make_trainer(tmp_path).compress(CausalLM(llama, strategy=strategy), data, out)
    no_training = corpus(tmp_path, llama, train=None)
    for strategy in (KroneckerSVD(keep_ratio=0.5), SVD(keep_ratio=0.5, refit=True)):
        with pytest.raises(MissingSplitError):
            make_trainer(tmp_path).compress(CausalLM(llama, strategy=strategy), no_training, out)
    with pytest.raises(AssertionError, match="was scored"):
        make_trainer(tmp_path).compress(CausalLM(llama, strategy=SVD(keep_ratio=0.5)), no_training, out)
