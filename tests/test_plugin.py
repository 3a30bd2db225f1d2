"""A strategy from a package of somebody else's works by its class path, as any of this package's does."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser

from lowrank_pl.cli import main
from lowrank_pl.nn import LowRankLinear
from lowrank_pl.strategies import SVD, CompressionStrategy, StaticStrategy
from lowrank_pl.surgery import read_layout
from lowrank_pl.tasks import SequenceClassification
from tests.support.runs import make_task, make_trainer
from tests.support.synthetic import SyntheticData
from tests.support.tables import write_sst2

CONFIG = Path(__file__).parents[1] / "configs" / "recipes" / "glue_finetune.yaml"

METHOD = '''
"""Plain SVD of the weight, scaled first."""

from lowrank_pl.core import Factors, relative_error, truncated_svd
from lowrank_pl.strategies import ByRank, Factorised, StaticStrategy


class ScaledSVD(StaticStrategy):
    """Factorises the weight times a number, and divides by it again.

    Args:
        scale: The number.
        keep_ratio: Share to keep.
    """

    def __init__(self, scale: float = 1.0, keep_ratio: float = 0.5) -> None:
        super().__init__(keep_ratio)
        self.scale = scale

    def decompose(self, weight, measured, samples):
        def factorise(rank):
            found = truncated_svd(weight * self.scale, rank)
            factors = Factors(found.left, found.sigma / self.scale, found.right)
            return Factorised(factors, relative_error(weight, factors.product()))

        return ByRank(factorise)

    def options(self):
        return {"scale": self.scale, **super().options()}
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An importable package that this one has never heard of."""
    folder = tmp_path / "site" / "somebodys_methods"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("", encoding="utf-8")
    (folder / "scaled.py").write_text(METHOD, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield "somebodys_methods.scaled.ScaledSVD"
    for name in [name for name in sys.modules if name.startswith("somebodys_methods")]:
        del sys.modules[name]


def test_the_command_line_takes_it_by_class_path(
    package: str, tiny_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    main(
        [
            *("compress", "--config", str(CONFIG), "--output", str(out)),
            f"--model.init_args.pretrained={tiny_bert}",
            f"--data.init_args.path={write_sst2(tmp_path / 'SST-2')}",
            *("--data.init_args.task=SST-2", "--trainer.accelerator=cpu", "--trainer.logger=false"),
            *("--trainer.enable_progress_bar=false", f"--model.init_args.strategy={package}"),
            "--model.init_args.strategy.init_args.keep_ratio=0.4",
            "--model.init_args.strategy.init_args.scale=3",
        ]
    )
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["method"] == "ScaledSVD"
    assert report["options"]["scale"] == 3.0
    assert 0.3 < report["keep_ratio"] <= 0.4
    # The checkpoint loads where nobody has the package.
    monkeypatch.undo()
    monkeypatch.delitem(sys.modules, package.rpartition(".")[0])
    task = SequenceClassification.load_from_checkpoint(out / "model.ckpt", weights_only=True)
    assert set(read_layout(task.encoder).modules) == {row["name"] for row in report["layers"]}


def test_a_parser_of_somebody_s_makes_it(package: str, tiny_bert: str, tmp_path: Path) -> None:
    parser = ArgumentParser()
    parser.add_argument("--method", type=CompressionStrategy)
    given = parser.parse_args([f"--method={package}", "--method.scale=2.0", "--method.keep_ratio=0.5"])
    method: Any = parser.instantiate_classes(given).method
    assert isinstance(method, StaticStrategy)
    mine, theirs = (make_task(tiny_bert, strategy) for strategy in (method, SVD(keep_ratio=0.5)))
    for task in (mine, theirs):
        pl.seed_everything(0, verbose=False)
        make_trainer(tmp_path, max_epochs=0).fit(task, SyntheticData())
    pairs = list(zip(mine.encoder.modules(), theirs.encoder.modules(), strict=True))
    layers = [(ours, plain) for ours, plain in pairs if isinstance(plain, LowRankLinear)]
    assert layers
    for ours, plain in layers:
        assert torch.allclose(ours.weight, plain.weight, atol=1e-5)
