"""Layers factorised behind factorised ones: what each is the best answer to, and runs that are stopped and go on."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_pl import compress
from lowrank_pl.allocation import LayerOverride, Uniform
from lowrank_pl.checkpoint import load_model
from lowrank_pl.core import kronecker_groups
from lowrank_pl.errors.numerics import NonFiniteError, RangeError
from lowrank_pl.errors.outputs import BlocksMismatchError
from lowrank_pl.strategies import SVD, BlockByBlock, Calibration, KroneckerSVD, layer_factoriser, sequential
from lowrank_pl.strategies.finished_blocks import FinishedBlocks
from lowrank_pl.surgery import TargetSelector, read_layout
from tests.strategies import killed_blocks
from tests.strategies.test_refit import Routed, cross_entropies, vectors
from tests.support.forks import Forks
from tests.support.runs import make_task, make_trainer
from tests.support.synthetic import SyntheticData
from tests.support.tiny import save_tiny_model, tiny_decoder

BATCHES = [
    {"input_ids": torch.randint(5, 30, (8, 12), generator=torch.Generator().manual_seed(seed))} for seed in (0, 1)
]


def loss(model: Any, batch: Any) -> Tensor:
    logits, wanted = model(**batch).logits[:, :-1], batch["input_ids"][:, 1:]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="none").mean(1)


def method(side: Any = "input", **options: Any) -> KroneckerSVD:
    found = {"keep_ratio": 0.5, "calibration": Calibration(cache=False), "damping": 0.0, "refit": False, **options}
    return KroneckerSVD(side, **found)


def inputs_of(model: nn.Module, name: str) -> Tensor:
    """What a layer gets, `[tokens, n]`."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in BATCHES:
            model(**batch)
    handle.remove()
    return torch.cat([x.flatten(0, -2) for x in seen]).double()


def distance(model: Any, dense: Any) -> float:
    with torch.no_grad():
        return sum(float((model(**b).logits - dense(**b).logits).square().sum()) for b in BATCHES)


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # without biases; with them, and with transposed weights
def test_every_layer_is_the_best_of_its_rank_for_the_inputs_that_it_gets(family: str) -> None:
    dense = tiny_decoder(family)
    layers: dict[str, Any] = dict(TargetSelector().select(dense))
    model = copy.deepcopy(dense)
    record = compress(model, BATCHES, loss, method(sequential=BlockByBlock(ridge=1e-5)))
    checked = 0
    for told in record.layers:
        if told.name not in read_layout(model).modules:
            continue
        layer: Any = model.get_submodule(told.name)
        # Layers behind it do not change what it gets, so the finished model shows what it was made for.
        x, z = inputs_of(dense, told.name), inputs_of(model, told.name)
        weight = layers[told.name].weight.detach().double()
        wanted = x @ (weight if family == "gpt2" else weight.mT)
        given = z @ layer.product().detach().double().mT
        if layer.bias is not None:
            given += (layer.bias - layers[told.name].get_parameter("bias")).detach().double()
            z, wanted, given = (part - part.mean(0) for part in (z, wanted, given))
        # Directions that a layer before has closed hold nothing but the rounding of float32.
        best = torch.linalg.lstsq(z, wanted, rcond=1e-5, driver="gelsd").solution
        u, _, _ = torch.linalg.svd((z @ best).mT, full_matrices=False)
        basis = u[:, : layer.rank]
        least = (wanted - z @ best @ basis @ basis.mT).square().sum()  # reduced-rank regression
        # What the ridge costs behind GPT-2's activation, where directions fade away by and by; elsewhere nothing.
        assert (wanted - given).square().sum() <= least * (1.07 if told.name.endswith("mlp.c_proj") else 1.001)
        checked += 1
    assert checked >= 8


def test_towards_own_inputs_each_weight_is_whitened_by_what_comes_in() -> None:
    model = tiny_decoder("llama")
    layers = {name: copy.deepcopy(layer) for name, layer in TargetSelector().select(model).items()}
    compress(model, BATCHES, loss, method(sequential=BlockByBlock("own_inputs")))
    for name in ("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj"):
        z, layer = inputs_of(model, name), model.get_submodule(name)
        weight = layers[name].get_parameter("weight").detach()
        groups = kronecker_groups(weight, z.mT @ z, damping=0)
        torch.testing.assert_close(layer.product(), groups.factors(layer.rank).product(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("toward", "batches"), [("own_inputs", 0), ("dense_outputs", len(BATCHES))])
def test_the_dense_model_is_run_only_where_its_outputs_count(toward: str, batches: int) -> None:
    model = tiny_decoder("llama")
    layers = TargetSelector().select(model)
    calls = dict.fromkeys(layers, 0)

    def counting(name: str) -> Any:
        def hook(*_: object) -> None:
            calls[name] += 1

        return hook

    for name, layer in layers.items():
        layer.register_forward_hook(counting(name))
    compress(model, BATCHES, loss, method(sequential=BlockByBlock(toward)))
    of_the_first_block = calls["model.layers.0.mlp.down_proj"] - 1  # one pass shows the order of the calls
    assert of_the_first_block >= batches
    assert bool(of_the_first_block) == bool(batches)


def test_outputs_are_closer_to_the_dense_model_than_with_a_refit() -> None:
    dense = tiny_decoder("llama")
    distances = []
    for options in ({}, {"refit": True}, {"sequential": True}):
        model = copy.deepcopy(dense)
        compress(model, BATCHES, loss, method("both", damping=1e-3, **options))
        distances.append(distance(model, dense))
    assert distances[2] < distances[1] < distances[0]


@pytest.mark.parametrize("options", [{"side": "output"}, {"diagonal": True}, {"block_size": 8}, {"form": "pivoted"}])
def test_every_metric_and_form_can_be_fitted(options: dict[str, Any]) -> None:
    model = tiny_decoder("llama")
    record = compress(model, BATCHES, loss, method(**{"side": "both", **options}, sequential=True))
    assert any("in the order of their calls" in note for note in record.notes)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_a_vocabulary_is_factorised_before_them() -> None:
    model = tiny_decoder("llama")
    options = {"targets": TargetSelector(embeddings=True), "overrides": [LayerOverride("model.embed_tokens", rank=8)]}
    record = compress(model, BATCHES, loss, method("both", damping=1e-3, sequential=True, **options))
    assert "model.embed_tokens" in read_layout(model).modules
    (note,) = (note for note in record.notes if "in the order of their calls" in note)
    assert note.endswith("; 1 that are called several times, or never, before them")


def test_layers_that_are_called_several_times_are_those_of_the_dense_model(tmp_path: Path) -> None:
    pretrained = str(save_tiny_model("albert", tmp_path / "model"))
    states = []
    for option in (False, True):
        task = make_task(pretrained, method("both", sequential=option))
        make_trainer(tmp_path, logger=False, max_epochs=0).fit(task, datamodule=SyntheticData())
        states.append(task.encoder.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_layers_that_get_other_tokens_keep_their_weight_as_the_target() -> None:
    torch.manual_seed(0)
    model = Routed()
    record = compress(model, vectors(), cross_entropies, method("both", keep_ratio=0.7, sequential=True))
    (note,) = (note for note in record.notes if "other tokens" in note)
    assert note.startswith("layers that get other tokens than in the dense model: ")
    assert "e.g. 'experts." in note


def test_moments_on_disk_change_nothing_and_are_gone_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    states = []
    for max_memory in (None, 1e-4):
        model = tiny_decoder("llama")
        options = {"calibration": Calibration(cache=False, max_memory=max_memory), "allocation": Uniform()}
        compress(model, BATCHES, loss, method("both", **options, sequential=True))
        states.append(model.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert not list(tmp_path.iterdir())


class Deep(nn.Module):
    """Four blocks, between which the model may do something."""

    def __init__(self, between: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4))
        self.head = nn.Linear(6, 2)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x + self.between) if self.between else block(x)
        found: Tensor = self.head(x)
        return found


@pytest.mark.parametrize(("between", "expected"), [(0.0, "012"), (1.0, "2")])
def test_dense_layers_leave_the_device_when_no_pass_needs_them(
    between: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[str] = []
    monkeypatch.setattr(sequential._InOrder, "leave", lambda _, names: left.extend(names))
    torch.manual_seed(0)
    compress(Deep(between), vectors(), cross_entropies, method(keep_ratio=0.7, sequential=True))
    assert left == [f"blocks.{block}.0" for block in expected]


@pytest.mark.parametrize("form", ["low_rank", "pivoted"])
def test_factors_are_trained_as_the_dense_layers_would_be(form: Any) -> None:
    torch.manual_seed(0)
    model = Deep(0.0)
    model.blocks[1].requires_grad_(False)
    model.blocks[2].eval()
    compress(model, vectors(), cross_entropies, method(keep_ratio=0.7, sequential=True, form=form))
    assert set(read_layout(model).modules) == {f"blocks.{block}.0" for block in range(4)}
    for block, (trained, mode) in enumerate([(True, True), (False, True), (True, False), (True, True)]):
        layer = model.get_submodule(f"blocks.{block}.0")
        assert {parameter.requires_grad for parameter in layer.parameters()} == {trained}
        assert {module.training for module in layer.modules()} == {mode}


def test_layers_outside_of_blocks_are_fitted_by_whole_passes() -> None:
    torch.manual_seed(0)
    dense = nn.ModuleDict({"first": nn.Linear(6, 6), "second": nn.Linear(6, 6), "head": nn.Linear(6, 2)})
    model = copy.deepcopy(dense)

    def loss(model: Any, batch: Any) -> Tensor:
        logits = model["head"](torch.tanh(model["second"](torch.tanh(model["first"](batch[0])))))
        return torch.nn.functional.cross_entropy(logits, batch[1], reduction="none")

    options = {"keep_ratio": 0.7, "targets": TargetSelector(["first", "second"]), "damping": 1e-9}
    compress(model, vectors(), loss, method(**options, sequential=BlockByBlock(ridge=1e-9)))
    x = torch.cat([batch[0] for batch in vectors()])
    wanted = dense["second"](torch.tanh(dense["first"](x))).double().detach()
    layer: Any = model["second"]
    z = torch.tanh(model["first"](x)).double().detach()
    z, wanted = z - z.mean(0), wanted - wanted.mean(0)
    best = torch.linalg.lstsq(z, wanted).solution
    basis = torch.linalg.svd((z @ best).mT, full_matrices=False)[0][:, : layer.rank]
    least = (wanted - z @ best @ basis @ basis.mT).square().sum()
    assert (wanted - z @ layer.product().detach().double().mT).square().sum() <= 1.001 * least


def test_an_activation_that_is_not_finite_is_told_with_its_block() -> None:
    model = tiny_decoder("llama")
    model.model.layers[1].input_layernorm.weight.data[0] = torch.inf
    before = dict(model.named_modules())
    with pytest.raises(
        NonFiniteError, match=r"activation in block 'model\.layers\.1'.*'model\.layers\.1\.self_attn\.q_proj'"
    ):
        compress(model, BATCHES, loss, method(sequential=True))
    assert dict(model.named_modules()) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: BlockByBlock("x"), "sequential.toward='x'"),
        (lambda: BlockByBlock(ridge=0.0), "sequential.ridge=0.0"),
        (lambda: BlockByBlock(max_samples=0), "sequential.max_samples=0"),
        (lambda: method(sequential=3), "sequential=3"),
    ],
)
def test_bad_options_are_refused(make: Any, told: str) -> None:
    with pytest.raises(RangeError, match=told):
        make()


class StoppedError(Exception):
    """A run is killed."""


def run(pretrained: str, folder: Path, **options: Any) -> dict[str, Tensor]:
    """`compress` of a model of four blocks."""
    strategy = method(
        "both", damping=1e-3, calibration=Calibration(cache=False, max_samples=32), sequential=True, **options
    )
    task = make_task(pretrained, strategy)
    make_trainer(folder, logger=False).compress(task, SyntheticData(), str(folder / "out"))
    state: dict[str, Tensor] = task.encoder.state_dict()
    return state


def run_and_stop(blocks: int, pretrained: str, folder: Path) -> None:
    """The same, until so many blocks are finished."""
    save = FinishedBlocks.save

    def stopping(self: FinishedBlocks, *given: Any) -> None:
        nonlocal blocks
        save(self, *given)
        blocks -= 1
        if blocks == 0:
            raise StoppedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FinishedBlocks, "save", stopping)
        with pytest.raises(StoppedError):
            run(pretrained, folder)


def read_layout_of(state: dict[str, Tensor], part: str) -> list[str]:
    """The factorised layers in a state dict whose name has a part."""
    return [name.removesuffix(".left.weight") for name in state if part in name and name.endswith(".left.weight")]


@pytest.fixture
def deep(tmp_path: Path) -> str:
    """A model of three blocks."""
    return str(save_tiny_model("bert", tmp_path / "model", layers=3))


def test_a_run_that_was_stopped_goes_on_where_it_was(
    deep: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run(deep, tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == ["out"]
    run_and_stop(2, deep, tmp_path / "parts")
    kept = tmp_path / "parts" / "out.blocks"
    assert {path.name for path in (kept / "blocks").iterdir()} == {"00000.safetensors", "00001.safetensors"}
    needed = {path.stem for path in (kept / "moments").iterdir()}
    assert all(layer in needed for layer in read_layout_of(whole, "layer.2."))
    assert not any(layer in needed for layer in read_layout_of(whole, "layer.0."))
    measured: list[str] = []
    monkeypatch.setattr(layer_factoriser, "measure_importance", lambda *_: measured.append(""))
    assert not (tmp_path / "parts" / "out").exists()
    again = run(deep, tmp_path / "parts")
    assert "going on with the blocks that an earlier start has finished" in caplog.text
    assert not measured
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["out"]


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_model(
    deep: str, tmp_path: Path, everything_loaded: Forks
) -> None:
    """By SIGKILL, at a moment when a file is written and has not got its name yet."""
    outputs = tmp_path / "whole" / "out", tmp_path / "killed" / "out"
    killed_blocks.compress(deep, outputs[0])
    everything_loaded.run([killed_blocks.__file__, deep, str(outputs[1])], tmp_path)
    assert [path.name for path in outputs[1].parent.iterdir()] == ["out"]
    whole, other = (load_model(str(output)).state_dict() for output in outputs)
    assert whole.keys() == other.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-5)  # may have another number of threads


def test_blocks_of_another_run_are_neither_used_nor_overwritten(deep: str, tmp_path: Path) -> None:
    run_and_stop(1, deep, tmp_path)
    kept = tmp_path / "out.blocks"
    before = {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}
    with pytest.raises(BlocksMismatchError, match=r"had keep_ratio=0\.5, here it is 0\.4.*give another --output"):
        run(deep, tmp_path, keep_ratio=0.4)
    with pytest.raises(BlocksMismatchError, match="had another model"):
        run(str(save_tiny_model("bert", tmp_path / "other", seed=1, layers=3)), tmp_path)
    with pytest.raises(BlocksMismatchError, match='had form="low_rank", here it is "pivoted"'):
        run(deep, tmp_path, form="pivoted")  # whose ranks are higher at the same cost
    (kept / "run.safetensors").unlink()
    with pytest.raises(BlocksMismatchError, match="format=nothing"):
        run(deep, tmp_path)
    assert {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}.items() <= before.items()


def test_nothing_is_kept_by_methods_that_work_in_one_go() -> None:
    assert not SVD(keep_ratio=0.5).keeps_progress
    assert not method().keeps_progress
    assert method(sequential=True).keeps_progress
    assert method(sequential=True).options()["sequential"] == BlockByBlock().options()
