"""An ONNX export computes in onnxruntime what torch does, at every shape, from thin factors; or there is none."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from lowrank_pl.checkpoint import describe
from lowrank_pl.errors.model import ModelFolderError, NotACheckpointError, OnnxExportError, OnnxMismatchError
from lowrank_pl.errors.run import MissingPackagesError
from lowrank_pl.export import export, from_pretrained, onnx_file
from lowrank_pl.export.onnx_file import model_inputs
from lowrank_pl.hub import longest_input
from lowrank_pl.nn import LowRankLinear
from lowrank_pl.strategies import RankDyna
from lowrank_pl.surgery import read_layout
from lowrank_pl.tasks import SequenceClassification
from tests.export.test_export import CLASSES, checkpoint
from tests.support.runs import last_checkpoint, make_task, make_trainer
from tests.support.synthetic import SyntheticData
from tests.support.tiny import FAMILIES, save_tiny_model

# Every family once, every kind of task at least once.
CASES = {
    "bert": "masked_lm",
    "roberta": "classification",
    "distilbert": "token_classification",
    "albert": "classification",
    "electra": "regression",
    "deberta-v2": "token_classification",
    "mpnet": "classification",
    "modernbert": "classification",
    "mobilebert": "classification",
}
TYPED = {"bert", "roberta", "albert", "electra", "mobilebert"}  # more than one token type in tests.support.tiny
# What the position embeddings reach; RoBERTa counts from behind its padding index 0, MPNet always from behind 1.
LONGEST = {name: {"roberta": 127, "mpnet": 126}.get(name, 128) for name in FAMILIES}


@pytest.fixture(scope="module")
def flat_bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One layer: writing a file takes seconds for each, and further ones are the same."""
    return str(save_tiny_model("bert", tmp_path_factory.mktemp("flat") / "bert", layers=1))


@torch.no_grad()
def torch_logits(encoder: Any, inputs: dict[str, Tensor]) -> Tensor:
    logits: Tensor = encoder.eval()(**inputs).logits
    return logits


def onnx_logits(where: Path, inputs: dict[str, Tensor]) -> Tensor:
    session = onnxruntime.InferenceSession(where / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in inputs.items()})
    return torch.from_numpy(logits)


def same_logits(where: Path, encoder: Any, shapes: list[tuple[int, int]]) -> None:
    """The bound is relative: the logits of a random model are small, and an ignored mask changes them by 1e-4."""
    for batch, length in shapes:
        inputs = model_inputs(encoder, batch, length, seed=1)
        expected = torch_logits(encoder, inputs)
        bound = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(onnx_logits(where, inputs), expected, rtol=0, atol=bound)


def matrices(tensors: Any) -> Counter[tuple[int, ...]]:
    """How often which shape occurs; a file may keep a matrix transposed."""
    return Counter(tuple(sorted(shape)) for shape in tensors if len(shape) == 2)


def stored(where: Path) -> Counter[tuple[int, ...]]:
    graph = onnx.load(str(where / "model.onnx")).graph
    return matrices(tuple(t.dims) for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT)


def axes(value: Any) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_computes_the_same_at_every_shape(family: str, tmp_path: Path) -> None:
    pretrained = str(save_tiny_model(family, tmp_path / "pretrained", layers=1))  # as flat_bert
    task = checkpoint(pretrained, tmp_path / "model.ckpt", CASES[family])
    where = export(str(tmp_path / "model.ckpt"), str(tmp_path / "out"), format="onnx")

    longest = LONGEST[family]
    assert longest_input(task.encoder) == longest
    same_logits(where, task.encoder, [(1, 1), (1, 2), (2, 1), (4, 17), (2, longest - 1), (1, longest)])

    graph = onnx.load(str(where / "model.onnx")).graph
    inputs = {value.name: axes(value) for value in graph.input}
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if family in TYPED else [])]
    assert inputs == {name: ["batch", "length"] for name in names}
    (output,) = graph.output
    assert output.name == "logits"
    assert axes(output)[0] == "batch"

    told = json.loads((where / "report.json").read_text())["onnx"]
    assert told["inputs"] == names
    assert told["opset"] == 18
    assert told["onnxruntime"] == onnxruntime.__version__
    assert told["shapes"] == [[1, 1], [2, 5], [3, 33], [1, longest]]
    assert 0 <= told["max_abs_difference"] < 1e-6


@pytest.mark.parametrize("factorised", [True, False])
def test_matrices_are_stored_as_the_checkpoint_has_them(flat_bert: str, tmp_path: Path, factorised: bool) -> None:
    if factorised:
        encoder = checkpoint(flat_bert, tmp_path / "model.ckpt").encoder
    else:
        task = SequenceClassification(flat_bert)
        task.build(CLASSES)
        encoder = task.encoder
        told = describe(encoder.config, read_layout(encoder), CLASSES, None)
        torch.save({"state_dict": task.state_dict(), **told}, tmp_path / "model.ckpt")
    where = export(str(tmp_path / "model.ckpt"), str(tmp_path / "out"), format="onnx")
    assert stored(where) == matrices(tuple(parameter.shape) for parameter in encoder.parameters())
    same_logits(where, encoder, [(1, 1), (4, 17)])
    card = (where / "README.md").read_text()
    assert ("low-rank\n\n" in card, "| layer | rank |" in card) == (factorised, factorised)
    config = json.loads((where / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert not {"auto_map", "lowrank_layout", "lowrank_base"} & config.keys()
    for trace in (".py", "site-packages", str(Path.home())):  # of the machine that exported
        assert trace.encode() not in (where / "model.onnx").read_bytes()


def test_the_folder_of_a_run_works_as_its_card_says(tiny_bert: str, tmp_path: Path) -> None:
    task = make_task(tiny_bert, RankDyna(keep_ratio=0.4))
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

    found = re.search("```python\n(.*)```", card, re.DOTALL)
    assert found is not None
    scope: dict[str, Any] = {}
    exec(found[1].replace("…", str(where)), scope)
    inputs = {name: torch.from_numpy(value) for name, value in scope["inputs"].items()}
    assert not inputs["attention_mask"].all()  # the second text is padded
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
for name in sys.argv[1:]:
    sys.modules[name] = None
from lowrank_pl.errors.run import MissingPackagesError
from lowrank_pl.export import export
try:
    export("no.ckpt", "out", format="onnx")
except MissingPackagesError as error:
    print(error)
"""


def test_the_package_works_where_the_extra_is_not_installed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ABSENT, "onnx", "onnxscript", "onnx_ir", "onnxruntime"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "'onnx', 'onnxscript', 'onnxruntime'" in result.stdout
    assert 'pip install "lowrank-pl[onnx]"' in result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_each_missing_package_is_told(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackagesError, match=f"not installed: '{name}'\\."):
        export("no.ckpt", str(tmp_path / "out"), format="onnx")


def refused(pretrained: str, tmp_path: Path, error: type[Exception], match: str) -> None:
    checkpoint(pretrained, tmp_path / "model.ckpt")
    with pytest.raises(error, match=match):
        export(str(tmp_path / "model.ckpt"), str(tmp_path / "out"), format="onnx")
    assert not list(tmp_path.glob("*out*"))


def test_other_logits_are_refused(flat_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = onnx_file._program

    def shifted(model: Any) -> Any:
        other = copy.deepcopy(model)
        other.classifier.bias.data += 2e-4
        return write(other)

    monkeypatch.setattr(onnx_file, "_program", shifted)
    refused(flat_bert, tmp_path, OnnxMismatchError, r"batch 1 and length 1 differ by 0\.0002, allowed is 0\.0001;")


def test_a_file_for_a_single_shape_is_refused(flat_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = torch.onnx.export
    monkeypatch.setattr(
        torch.onnx, "export", lambda *args, **kwargs: write(*args, **{**kwargs, "dynamic_shapes": None})
    )
    refused(flat_bert, tmp_path, OnnxMismatchError, "onnxruntime fails at batch 1 and length 1")


def test_a_branch_by_value_is_refused(flat_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = LowRankLinear.forward
    monkeypatch.setattr(LowRankLinear, "forward", lambda self, x: forward(self, x) if x.sum() > 0 else x)
    refused(flat_bert, tmp_path, OnnxExportError, "BertForSequenceClassification cannot be written as ONNX")
