"""Models of every method, with dense, shared and tied layers, in one file and in shards: each way of loading agrees."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lowrank_pl.allocation import LayerOverride
from lowrank_pl.contract import TargetKind
from lowrank_pl.export import export, from_pretrained
from lowrank_pl.strategies import FWSVD, SVD, TFWSVD, CompressionStrategy, RankDyna
from lowrank_pl.surgery import TargetSelector
from lowrank_pl.tasks import EncoderTask, MaskedLM, SequenceClassification
from tests.export.test_export import INPUTS, logits
from tests.support.forks import Forks
from tests.support.runs import last_checkpoint, make_trainer
from tests.support.synthetic import SyntheticData
from tests.support.tiny import save_tiny_model

METHODS = ["SVD", "FWSVD", "TFWSVD", "RankDyna"]
PIVOTED = "FWSVD"
DENSE = "*.query"
# BERT has a layer of its own at every depth, ALBERT shares one; masked LMs tie their decoder to the embeddings.
MODELS: dict[str, tuple[str, TargetKind, type[EncoderTask]]] = {
    "plain": ("bert", "classification", SequenceClassification),
    "shared": ("albert", "classification", SequenceClassification),
    "tied": ("bert", "masked_lm", MaskedLM),
    "shared and tied": ("albert", "masked_lm", MaskedLM),
}
# What a run leaves is the same kind of layer whatever the method: every method with the plain model, and with each
# other model one whose ranks fell in training and one whose did not.
CASES = [
    *((method, "plain") for method in METHODS),
    *(("RankDyna", model) for model in MODELS if model != "plain"),
    ("TFWSVD", "shared"),
    ("FWSVD", "tied"),
    ("SVD", "shared and tied"),
]
SIZES = {"one file": None, "shards": "20KB"}


def strategy(method: str) -> CompressionStrategy:
    """Compresses to a half and leaves some layers dense."""
    if method == "RankDyna":
        return RankDyna(keep_ratio=0.5, targets=TargetSelector(exclude=[DENSE]), allow_dense=False)
    kind: Any = {"SVD": SVD, "FWSVD": FWSVD, "TFWSVD": TFWSVD}[method]
    form = "pivoted" if method == PIVOTED else "low_rank"
    made: CompressionStrategy = kind(keep_ratio=0.5, overrides=[LayerOverride(DENSE, dense=True)], form=form)
    return made


@dataclass(frozen=True)
class Trained:
    """A model that a run has made, and where it was exported to.

    Attributes:
        task: With the trained encoder.
        expected: Its logits.
        folders: The exported folders.
    """

    task: EncoderTask
    expected: Tensor
    folders: dict[str, Path]


def train(method: str, model: str, where: Path) -> Trained:
    """Fits for one epoch, and exports the checkpoint."""
    family, kind, task_class = MODELS[model]
    pl.seed_everything(0, verbose=False)
    task = task_class(str(save_tiny_model(family, where / "pretrained")), strategy=strategy(method))
    trainer = make_trainer(where)
    trainer.fit(task, datamodule=SyntheticData(kind, size=24))
    source = last_checkpoint(trainer)
    folders = {
        name: export(source, str(where / name.replace(" ", "-")), max_shard_size=size) for name, size in SIZES.items()
    }
    return Trained(task, logits(task.encoder), folders)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Trained]:
    """A run of every case."""
    where = tmp_path_factory.mktemp("trained")
    return {(m, n): train(m, n, where / m / n.replace(" ", "-")) for m, n in CASES}


REMOTE = """
import json, sys
sys.modules["lowrank_pl"] = None  # as where it is not installed
import torch, transformers
torch.set_num_threads(1)
inputs = torch.load("inputs.pt", weights_only=True)
found = {}
for folder, auto in json.load(open("folders.json")).items():
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        found[folder] = model(**inputs).logits
torch.save(found, "logits.pt")
"""


@pytest.fixture(scope="module")
def remote(
    transformers_loaded: Forks, trained: dict[tuple[str, str], Trained], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Tensor]:
    """The logits of every folder in one process that has only transformers, by folder."""
    where = tmp_path_factory.mktemp("remote")
    folders = {str(f): one.task.auto_class.__name__ for one in trained.values() for f in one.folders.values()}
    (where / "folders.json").write_text(json.dumps(folders))
    torch.save(INPUTS, where / "inputs.pt")
    transformers_loaded.run(["-c", REMOTE], where)
    found: dict[str, Tensor] = torch.load(where / "logits.pt", weights_only=True)
    return found


@pytest.mark.parametrize("size", list(SIZES))
@pytest.mark.parametrize(("method", "model"), CASES)
def test_every_way_gives_the_trained_models_logits(
    trained: dict[tuple[str, str], Trained], remote: dict[str, Tensor], method: str, model: str, size: str
) -> None:
    one = trained[method, model]
    where, expected = one.folders[size], one.expected
    assert (where / "model.safetensors.index.json").exists() == (size == "shards")
    assert torch.equal(logits(from_pretrained(str(where))), expected)
    again: Any = type(one.task)(init_from=str(where))
    again.build(one.task.target)
    assert torch.equal(logits(again.encoder), expected)
    assert torch.equal(remote[str(where)], expected)


@pytest.mark.parametrize(("method", "model"), CASES)
def test_the_models_are_what_the_tests_are_about(
    trained: dict[tuple[str, str], Trained], method: str, model: str
) -> None:
    """Factorised beside dense layers, shared layers once, tied embeddings once."""
    one = trained[method, model]
    loaded: Any = from_pretrained(str(one.folders["one file"]))
    layout = json.loads((one.folders["one file"] / "config.json").read_text())["lowrank_layout"]["modules"]
    queries = [module for name, module in loaded.named_modules() if name.endswith(".query")]
    assert queries
    assert all(type(module) is nn.Linear for module in queries)
    shared = model.startswith("shared")
    assert len(queries) == (1 if shared else 2)
    assert len(layout) == (5 if shared else 10)
    assert {spec["form"] for spec in layout.values()} == {"pivoted" if method == PIVOTED else "low_rank"}
    if model.endswith("tied"):
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_the_trained_models_differ(trained: dict[tuple[str, str], Trained]) -> None:
    for model in MODELS:
        found = [one.expected for (_, other), one in trained.items() if other == model]
        assert len(found) > 1
        assert not any(torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])


@pytest.mark.parametrize("method", METHODS)
def test_a_dense_export_loads_in_shards_too(
    trained: dict[tuple[str, str], Trained], tmp_path: Path, method: str
) -> None:
    one = trained[method, "plain"]
    source = str(next(one.folders["shards"].parent.rglob("*.ckpt")))
    for name, size in SIZES.items():
        where = export(source, str(tmp_path / name), "dense", max_shard_size=size)
        assert (len(list(where.glob("*.safetensors"))) == 1) == (size is None)
        again: Any = type(one.task)(init_from=str(where))
        again.build(one.task.target)
        torch.testing.assert_close(logits(again.encoder), one.expected, rtol=0, atol=1e-5)
        # Shards change nothing of the numbers.
        found = logits(one.task.auto_class.from_pretrained(where))
        assert torch.equal(found, logits(again.encoder))
