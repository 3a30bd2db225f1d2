"""Folders in eight bits for torch: written whole, read by every verb that needs no gradient, and by no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_pl.benchmark import benchmark
from lowrank_pl.benchmark.models import count_flops, inputs_for, weight_bytes
from lowrank_pl.checkpoint import int8, load_model
from lowrank_pl.cli import main
from lowrank_pl.errors.arguments import MissingArgumentError
from lowrank_pl.errors.checkpoint import QuantizedModelError
from lowrank_pl.errors.export import QuantizationError
from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.errors.run import MissingPackagesError
from lowrank_pl.export import export, from_pretrained, int8_layers, save_pretrained
from lowrank_pl.nn import PivotedLinear, forms_in
from lowrank_pl.strategies import SVD
from tests.checkpoint.test_int8 import without_torchao
from tests.export.test_export import checkpoint, logits
from tests.export.test_scoring import data_files
from tests.support.runs import make_task, make_trainer
from tests.support.synthetic import SyntheticData
from tests.support.tiny import save_tiny_model


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"quantize": "int8_dynamic", "format": "onnx"}, "'int8' with format 'onnx'"),
        ({"quantize": "int8"}, "'int8_weight_only' or 'int8_dynamic' with the others"),
        ({"quantize": "int8_dynamic", "max_shard_size": "1MB"}, "null for .* models in eight bits"),
    ],
)
def test_other_combinations_are_refused_before_anything_is_read(
    options: dict[str, Any], allowed: str, tmp_path: Path
) -> None:
    with pytest.raises(RangeError, match=allowed):
        export("no.ckpt", str(tmp_path / "out"), **options)


def test_without_torchao_nothing_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_torchao(monkeypatch)
    with pytest.raises(MissingPackagesError, match="export --quantize int8_dynamic needs"):
        export("no.ckpt", str(tmp_path / "out"), quantize="int8_dynamic")


class TestWithTorchao:
    @pytest.fixture(autouse=True)
    def _needs(self) -> None:
        pytest.importorskip("torchao")

    @pytest.fixture
    def source(self, tmp_path: Path) -> str:
        checkpoint(str(save_tiny_model("bert", tmp_path / "pretrained", layers=1)), tmp_path / "model.ckpt")
        return str(tmp_path / "model.ckpt")

    @pytest.mark.parametrize(
        ("format", "scheme"),
        [("factored", "int8_dynamic"), ("factored", "int8_weight_only"), ("dense", "int8_dynamic")],
    )
    def test_the_distance_is_told_and_so_is_the_size(
        self, format: Any, scheme: Any, source: str, tmp_path: Path
    ) -> None:
        out = export(source, str(tmp_path / "out"), format=format, quantize=scheme)
        told = json.loads((out / "report.json").read_text())["int8"]
        loaded = from_pretrained(str(out))
        reference = logits(load_model(source))
        assert 0 < float((logits(loaded) - reference).norm() / reference.norm()) < 0.2
        assert 0 < told["relative_difference"] < 0.2
        assert told["scheme"] == scheme
        assert told["layers"] == (6 if format == "dense" else 11)  # one of six was left dense
        assert told["bytes"][1] == weight_bytes(loaded) < told["bytes"][0]
        card = (out / "README.md").read_text()
        assert "from lowrank_pl import from_pretrained" in card
        assert "AutoModel" not in card

    def test_what_was_loaded_is_saved_as_one_file_or_not_at_all(self, source: str, tmp_path: Path) -> None:
        loaded = from_pretrained(str(export(source, str(tmp_path / "out"), quantize="int8_weight_only")))
        with pytest.raises(RangeError, match="max_shard_size='1MB'"):
            save_pretrained(loaded, str(tmp_path / "again"), max_shard_size="1MB")
        assert not (tmp_path / "again").exists()

    def test_verbs_that_score_take_the_folder_and_those_that_change_weights_refuse_it(
        self, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        files = data_files(tmp_path / "data")
        data = ["--data=TextFiles", *(f"--data.init_args.{split}={path}" for split, path in files.items())]
        out = tmp_path / "out"
        words = ["--ckpt_path", source, "--output", str(out), "--quantize", "int8_dynamic", *data]
        main(["export", *words, "--max_drop", "0.5"])
        found = json.loads((out / "report.json").read_text())["export_scores"]
        assert (found["samples"], found["max_drop"]) == (36, 0.5)
        run = [
            *("--model=SequenceClassification", f"--model.init_args.pretrained={tmp_path / 'pretrained'}"),
            *(f"--model.init_args.init_from={out}", *data),
            *("--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false"),
        ]
        capsys.readouterr()
        main(["test", *run])
        rows = {row.split()[1]: row.split()[3] for row in capsys.readouterr().out.splitlines() if "test/" in row}
        assert float(rows["test/loss"]) == pytest.approx(found["after"]["loss"], abs=1e-6)
        main(["inspect", *run])
        with pytest.raises(QuantizedModelError, match="training or compression"):
            main(["fit", *run, "--trainer.max_epochs=1"])
        strategy = ["--model.init_args.strategy=SVD", "--model.init_args.strategy.init_args.keep_ratio=0.5"]
        with pytest.raises(QuantizedModelError, match="training or compression"):
            main(["compress", *run, *strategy, f"--output={tmp_path / 'c'}"])
        with pytest.raises(QuantizedModelError, match="export needs"):
            export(str(out), str(tmp_path / "twice"), quantize="int8_dynamic")
        assert not list(tmp_path.glob("*twice*"))

    def test_a_module_that_holds_it_is_not_trained(self, source: str, tmp_path: Path) -> None:
        out = export(source, str(tmp_path / "out"), quantize="int8_weight_only")
        task = make_task(None, SVD(0.5), init_from=str(out))
        task.build(SyntheticData().target)
        with pytest.raises(QuantizedModelError, match="fit needs"):
            make_trainer(tmp_path).fit(task, SyntheticData())

    def test_the_benchmark_times_it_in_torch_and_refuses_onnxruntime(self, source: str, tmp_path: Path) -> None:
        out = export(source, str(tmp_path / "out"), quantize="int8_dynamic")
        options: dict[str, Any] = {"batch_sizes": [2], "lengths": [4], "rounds": 1, "seconds": 1e-4, "layers": False}
        benchmark([source, str(out)], str(tmp_path / "times"), **options)
        told = json.loads((tmp_path / "times" / "benchmark.json").read_text())
        small, large = sorted(told["weight_bytes"].values())
        assert small == weight_bytes(from_pretrained(str(out))) < large
        first, second = (load_model(path) for path in (source, str(out)))
        inputs = inputs_for(first, 2, 4)
        # In float a pivoted layer puts its rows in order first, which multiplies r² more for each of the 8 tokens.
        more = sum(2 * 8 * form.rank**2 for form in forms_in(first).values() if isinstance(form, PivotedLinear))
        assert count_flops(first, inputs) == count_flops(second, inputs) + more
        with pytest.raises(MissingArgumentError, match=r"float weights of .* for onnxruntime"):
            benchmark([str(out)], str(tmp_path / "others"), **options, engines=["onnxruntime"])

    def test_a_folder_that_reads_back_otherwise_is_not_left(
        self, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def damaged(folder: str) -> Any:
            model = from_pretrained(folder)
            *_, weight = int8.int8_weights(model).values()
            weight.qdata[0, 0] += 1
            return model

        monkeypatch.setattr(int8_layers, "from_pretrained", damaged)
        with pytest.raises(QuantizationError, match="read back, its logits are others"):
            export(source, str(tmp_path / "out"), quantize="int8_weight_only")
        assert not list(tmp_path.glob("*out*"))

    def test_a_full_disk_leaves_nothing(self, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*args: Any, **kwargs: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("lowrank_pl.checkpoint.factorised.save_file", full)
        with pytest.raises(Exception, match="No space left") as caught:
            export(source, str(tmp_path / "out"), quantize="int8_dynamic")
        assert type(caught.value).__name__ == "OutputNotWritableError"
        assert not list(tmp_path.glob("*out*"))

    def test_inspect_shows_it_and_plans_nothing(
        self, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = str(export(source, str(tmp_path / "out"), quantize="int8_dynamic"))
        with pytest.raises(QuantizedModelError, match=r"'.*out' is in int8, and a plan of SVD needs the weights"):
            make_trainer(tmp_path).inspect(make_task(None, SVD(keep_ratio=0.5), init_from=out))
        make_trainer(tmp_path).inspect(make_task(None, init_from=out))
        text = capsys.readouterr().out
        assert text.count("factorised already") == 2 * 5
        assert text.count("in int8, rounded: nothing to factorise") == 2
        assert "keep_ratio" not in text


def test_torch_is_told_to_keep_its_integers_exact() -> None:
    """What `int8_dynamic` relies on, also where the processor has no instructions for it."""
    left = torch.full((20, 512), -127, dtype=torch.int8)
    right = torch.full((512, 9), 127, dtype=torch.int8)
    assert torch.equal(torch._int_mm(left, right), torch.full((20, 9), -127 * 127 * 512, dtype=torch.int32))
