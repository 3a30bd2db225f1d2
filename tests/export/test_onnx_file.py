"""An ONNX export computes in onnxruntime what torch does, from thin factors; or there is none."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from lowrank_pl.checkpoint import describe
from lowrank_pl.contract import TargetSpec
from lowrank_pl.errors.checkpoint import NotACheckpointError
from lowrank_pl.errors.export import OnnxExportError, OnnxMismatchError
from lowrank_pl.errors.pretrained import ModelFolderError
from lowrank_pl.errors.run import MissingPackagesError
from lowrank_pl.export import export, from_pretrained, onnx_file
from lowrank_pl.export.onnx_file import model_inputs
from lowrank_pl.nn import LowRankLinear
from lowrank_pl.strategies import RankDyna
from lowrank_pl.surgery import read_layout
from lowrank_pl.tasks import CausalLM, SequenceClassification
from tests.export.test_export import CLASSES
from tests.support.forks import Forks
from tests.support.onnx_once import Alter, OnnxOnce
from tests.support.runs import last_checkpoint, make_task, make_trainer
from tests.support.synthetic import SyntheticData
from tests.support.tiny import save_tiny_decoder


def flat_bert(flat_checkpoint: tuple[Any, str]) -> str:
    """The pre-trained folder that it was made from."""
    return str(Path(flat_checkpoint[1]).with_name("bert"))


@torch.no_grad()
def torch_logits(encoder: Any, inputs: dict[str, Tensor]) -> Tensor:
    logits: Tensor = encoder.eval()(**inputs).logits
    return logits


def onnx_logits(where: Path, inputs: dict[str, Tensor]) -> Tensor:
    session = onnxruntime.InferenceSession(where / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in inputs.items()})
    return torch.from_numpy(logits)


def same_logits(where: Path, encoder: Any, shapes: list[tuple[int, int]]) -> None:
    """The bound is relative: the logits of a random model are small, and an ignored mask changes them by 1e-4.

    It is relative to the largest logit of all shapes: the only one of a regression may be next to zero, being the
    difference of numbers that are not.
    """
    inputs = [model_inputs(encoder, batch, length, seed=1) for batch, length in shapes]
    expected = [torch_logits(encoder, given) for given in inputs]
    bound = 1e-5 * max(float(logits.abs().max()) for logits in expected)
    for given, logits in zip(inputs, expected, strict=True):
        torch.testing.assert_close(onnx_logits(where, given), logits, rtol=0, atol=bound)


def matrices(tensors: Any) -> Counter[tuple[int, ...]]:
    """How often which shape occurs; a file may keep a matrix transposed."""
    return Counter(tuple(sorted(shape)) for shape in tensors if len(shape) == 2)


def stored(where: Path) -> Counter[tuple[int, ...]]:
    graph = onnx.load(str(where / "model.onnx")).graph
    return matrices(tuple(t.dims) for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT)


@pytest.mark.parametrize("factorised", [True, False])
def test_matrices_are_stored_as_the_checkpoint_has_them(
    onnx_once: OnnxOnce, flat_checkpoint: tuple[Any, str], tmp_path: Path, factorised: bool
) -> None:
    encoder, source = flat_checkpoint
    if not factorised:
        task = SequenceClassification(flat_bert(flat_checkpoint))
        task.build(CLASSES)
        encoder, source = task.encoder, str(tmp_path / "model.ckpt")
        told = describe(encoder.config, read_layout(encoder), CLASSES, None)
        torch.save({"state_dict": task.state_dict(), **told}, source)
    where = export(source, str(tmp_path / "out"), format="onnx")
    assert stored(where) == matrices(tuple(parameter.shape) for parameter in encoder.parameters())
    same_logits(where, encoder, [(1, 1), (4, 17)])
    card = (where / "README.md").read_text()
    assert ("low-rank\n\n" in card, "| layer | rank |" in card) == (factorised, factorised)
    config = json.loads((where / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert not {"auto_map", "lowrank_layout", "lowrank_base"} & config.keys()
    for trace in (".py", "site-packages", str(Path.home())):  # of the machine that exported
        assert trace.encode() not in (where / "model.onnx").read_bytes()


def run_as_the_card_says(where: Path) -> dict[str, Any]:
    """What the lines of a folder's README.md leave behind, by name."""
    found = re.search("```python\n(.*)```", (where / "README.md").read_text(), re.DOTALL)
    assert found is not None
    scope: dict[str, Any] = {}
    exec(found[1].replace("…", str(where)), scope)
    return scope


def test_the_folder_of_a_run_works_as_its_card_says(flat_checkpoint: tuple[Any, str], tmp_path: Path) -> None:
    task = make_task(flat_bert(flat_checkpoint), RankDyna(keep_ratio=0.4))
    trainer = make_trainer(tmp_path, max_epochs=2)
    trainer.fit(task, datamodule=SyntheticData())
    (tmp_path / "report.json").write_text(json.dumps({"score": 0.5, "versions": {"torch": "2"}}))
    where = export(last_checkpoint(trainer), str(tmp_path / "out"), format="onnx", report=str(tmp_path / "report.json"))
    assert (where / "ranks.png").exists()
    report = json.loads((where / "report.json").read_text())
    assert report["score"] == 0.5
    card = (where / "README.md").read_text()
    assert f"at most {report['onnx']['max_abs_difference']:.2g} apart" in card
    assert "score: 0.5000" in card
    assert f"| {task.compression.layers[0].name} | {task.compression.layers[0].rank} |" in card

    scope = run_as_the_card_says(where)
    inputs = {name: torch.from_numpy(value) for name, value in scope["inputs"].items()}
    assert not inputs["attention_mask"].all()  # the second text is padded
    torch.testing.assert_close(torch.from_numpy(scope["logits"]), torch_logits(task.encoder, inputs), rtol=0, atol=1e-5)


def test_a_card_pads_nothing_where_the_tokenizer_has_no_token_for_it(tmp_path: Path) -> None:
    folder = save_tiny_decoder("gpt2", tmp_path / "gpt2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    task, target = CausalLM(str(folder)), TargetSpec("text", "causal_lm", (), ("perplexity",))
    task.build(target)
    told = describe(task.encoder.config, read_layout(task.encoder), target, None, str(folder))
    torch.save({"state_dict": task.state_dict(), **told}, tmp_path / "model.ckpt")
    scope = run_as_the_card_says(export(str(tmp_path / "model.ckpt"), str(tmp_path / "out"), format="onnx"))
    inputs = {name: torch.from_numpy(value) for name, value in scope["inputs"].items()}
    torch.testing.assert_close(torch.from_numpy(scope["logits"]), torch_logits(task.encoder, inputs), rtol=0, atol=1e-5)


def test_nothing_reads_it_back(tiny_bert: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name in ("config.json", "model.onnx"):
        (tmp_path / "out" / name).write_text("{}")
    for read in (from_pretrained, lambda folder: SequenceClassification(init_from=folder).build(CLASSES)):
        with pytest.raises(NotACheckpointError, match=r"model\.onnx is for onnxruntime alone.*--format factorised"):
            read(str(tmp_path / "out"))
    with pytest.raises(ModelFolderError, match=r"no weights \(model\.safetensors.*'model\.onnx'"):
        SequenceClassification(str(tmp_path / "out")).build(CLASSES)


ABSENT = """
import sys
for name in [name for name in sys.modules if name.split(".")[0] == "lowrank_pl"]:
    del sys.modules[name]  # imported anew below
for name in sys.argv[1:]:
    sys.modules[name] = None
from lowrank_pl.errors.run import MissingPackagesError
from lowrank_pl.export import export
try:
    export("no.ckpt", "out", format="onnx")
except MissingPackagesError as error:
    print(error)
"""


def test_the_package_works_where_the_extra_is_not_installed(everything_loaded: Forks, tmp_path: Path) -> None:
    said = everything_loaded.run(["-c", ABSENT, "onnx", "onnxscript", "onnx_ir", "onnxruntime"], tmp_path)
    assert "'onnx', 'onnxscript', 'onnxruntime'" in said
    assert 'pip install "lowrank-pl[onnx]"' in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_each_missing_package_is_told(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackagesError, match=f"not installed: '{name}'\\."):
        export("no.ckpt", str(tmp_path / "out"), format="onnx")


def refused(source: str, tmp_path: Path, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        export(source, str(tmp_path / "out"), format="onnx")
    assert not list(tmp_path.glob("*out*"))


def shift(model: onnx.ModelProto) -> None:
    """Adds to all logits."""
    graph = model.graph
    (last,) = (node for node in graph.node if "logits" in node.output)
    last.output[0] = "unshifted"
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(2e-4, dtype=np.float32), "shift"))
    graph.node.append(onnx.helper.make_node("Add", ["unshifted", "shift"], ["logits"]))


def fix_shape(model: onnx.ModelProto) -> None:
    """Takes inputs of batch 2 and length 8 only."""
    for value in model.graph.input:
        for axis, size in zip(value.type.tensor_type.shape.dim, (2, 8), strict=True):
            axis.dim_value = size  # in place of its name


@pytest.mark.parametrize(
    ("alter", "match"),
    [
        (shift, r"batch 1 and length 1 differ by 0\.0002, allowed is 0\.0001;"),
        (fix_shape, "onnxruntime fails at batch 1 and length 1"),
    ],
)
def test_a_file_that_is_wrong_is_refused(
    onnx_once: OnnxOnce,
    flat_checkpoint: tuple[Any, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    alter: Alter,
    match: str,
) -> None:
    monkeypatch.setattr(onnx_file, "_program", onnx_once.altered(alter))
    refused(flat_checkpoint[1], tmp_path, OnnxMismatchError, match)


def test_a_branch_by_value_is_refused(
    flat_checkpoint: tuple[Any, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = LowRankLinear.forward
    monkeypatch.setattr(LowRankLinear, "forward", lambda self, x: forward(self, x) if x.sum() > 0 else x)
    refused(flat_checkpoint[1], tmp_path, OnnxExportError, "BertForSequenceClassification cannot be written as ONNX")
