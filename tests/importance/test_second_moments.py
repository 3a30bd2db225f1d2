"""Second moments against autograd: inputs and output gradients of every token, one sample at a time."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

from lowrank_pl.core import LinearShape
from lowrank_pl.errors.numerics import MemoryBoundError, NonFiniteError, RangeError
from lowrank_pl.importance import second_moments
from lowrank_pl.importance.batches import Batch
from lowrank_pl.importance.gram import GramSum
from lowrank_pl.importance.second_moments import Extent, LayerMoments, SecondMoments
from lowrank_pl.surgery import TargetSelector
from tests.importance.reference import assert_same, classification_loss, single_samples
from tests.support.tiny import FAMILIES, VOCAB, tiny_config


def encoder(family: str = "bert", seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = tiny_config(family)
        config.num_labels = 3
        model: nn.Module = AutoModelForSequenceClassification.from_config(config)
    return model.eval()


def batches(count: int = 3, size: int = 5, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        lengths = torch.randint(4, 12, (size,), generator=generator)
        ids = torch.randint(5, len(VOCAB), (size, int(lengths.max())), generator=generator)
        mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
        labels = torch.randint(0, 3, (size,), generator=generator)
        made.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
    return made


def reference(
    model: nn.Module, layers: Mapping[str, nn.Module], data: list[dict[str, Tensor]]
) -> dict[str, LayerMoments]:
    """By hooks on a plain forward pass per unpadded sample, in float64."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}
    loss = classification_loss(model)
    samples = [sample for batch in data for sample in single_samples(batch)]
    for sample in samples:
        calls: list[tuple[str, Tensor, Tensor]] = []

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            name = next(n for n, other in layers.items() if other is module)
            output.retain_grad()
            calls.append((name, args[0].detach(), output))  # noqa: B023, used before the next sample

        handles = [layer.register_forward_hook(hook) for layer in layers.values()]
        loss(sample).sum().backward()
        for handle in handles:
            handle.remove()
        for name, x, output in calls:
            assert output.grad is not None
            x, g = x.double().flatten(0, -2), output.grad.double().flatten(0, -2)
            kept = g.abs().amax(1) > 0
            seen[name].append((x[kept], g[kept]))
    found = {}
    for name, rows in seen.items():
        x, g = (torch.cat(part) for part in zip(*rows, strict=True))
        found[name] = LayerMoments(x.mT @ x / len(x), g.mT @ g / len(samples))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_autograd_one_sample_at_a_time(family: str) -> None:
    model, data = encoder(family), batches()
    layers = TargetSelector().select(model)
    measured = SecondMoments().measure(model, layers, data, classification_loss(model))
    expected = reference(model, layers, data)
    assert measured.num_samples == 15
    for name, moments in measured.layers.items():
        for part, tensor in expected[name].tensors().items():
            assert_same(moments.tensors()[part], tensor, 1e-4)


def test_layers_with_one_input_share_one_tensor_and_others_do_not() -> None:
    model = encoder()
    layers = TargetSelector().select(model)
    measured = SecondMoments().measure(model, layers, batches(), classification_loss(model)).layers

    def same(first: str, second: str, block: int) -> bool:
        names = [f"bert.encoder.layer.{block}.{name}" for name in (first, second)]
        a, b = (measured[name].inputs for name in names)
        assert a is not None
        assert b is not None
        return a.data_ptr() == b.data_ptr()

    assert same("attention.self.key", "attention.self.value", 0)
    assert same("attention.self.key", "attention.self.query", 0)
    assert not same("attention.self.key", "attention.output.dense", 0)
    # In the last block only the first token's query is looked at, and every token's key.
    assert same("attention.self.key", "attention.self.value", 1)
    assert not same("attention.self.key", "attention.self.query", 1)


class _Branching(nn.Module):
    """Two layers that see the same input in the first pass only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        other = x if float(x[0, 0, 0]) < 1.5 else 2 * x
        y: Tensor = (self.first(x) + self.second(other).square()).sum(1)
        return y


def test_layers_that_part_later_are_measured_apart() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _Branching()
    layers = {"first": model.first, "second": model.second}
    data = [{"x": torch.rand(5, 2, 4, generator=torch.Generator().manual_seed(seed))} for seed in range(3)]
    data[2]["x"][:, :, 0] = 1 + torch.arange(5.0)[:, None]

    def loss(batch: Batch) -> Tensor:
        losses: Tensor = model(batch["x"]).square().sum(1)
        return losses

    alike = SecondMoments().measure(model, layers, data[:2], loss).layers
    assert alike["first"].inputs is alike["second"].inputs
    data[2]["x"][0, 0, 0] = 7
    apart = SecondMoments().measure(model, layers, data, loss).layers
    x = torch.cat([batch["x"] for batch in data]).flatten(0, 1).double()
    assert apart["first"].inputs is not apart["second"].inputs
    assert_same(apart["first"].tensors()["inputs"], x.mT @ x / len(x), 1e-6)


def test_padding_counts_for_nothing() -> None:
    model = encoder()
    layers = TargetSelector().select(model)
    data = batches(1)
    padded = [{k: F.pad(v, (0, 7)) if v.ndim == 2 else v for k, v in batch.items()} for batch in data]
    plain, wide = (
        SecondMoments().measure(model, layers, given, classification_loss(model)) for given in (data, padded)
    )
    for name, moments in plain.layers.items():
        for part, tensor in moments.tensors().items():
            assert_same(wide.layers[name].tensors()[part], tensor, 1e-5)


@pytest.mark.parametrize("extent", ["diagonal", "none", 16])
def test_parts_are_the_parts_of_the_whole(extent: Extent) -> None:
    model = encoder()
    layers = TargetSelector().select(model)
    whole = SecondMoments().measure(model, layers, batches(), classification_loss(model)).layers
    for kind in (SecondMoments(inputs=extent), SecondMoments(outputs=extent)):
        part = kind.measure(model, layers, batches(), classification_loss(model)).layers
        for name, moments in part.items():
            for side in ("inputs", "outputs"):
                full, own = getattr(whole[name], side), getattr(moments, side)
                if getattr(kind, side) == "none":
                    assert own is None
                else:
                    if own.ndim == 1:
                        full = full.diagonal()
                    if own.ndim == 3:
                        full = torch.stack([full[at : at + 16, at : at + 16] for at in range(0, len(full), 16)])
                    assert_same(own, full, 1e-6)


def test_two_halves_reduced_are_the_whole() -> None:
    model = encoder()
    layers = TargetSelector().select(model)
    loss = classification_loss(model)
    whole = SecondMoments().measure(model, layers, batches(4), loss)
    # Two processes, one after the other: what the first hands to be reduced waits for the second.
    handed: list[Tensor] = []
    SecondMoments().measure(model, layers, batches(4)[:1], loss, lambda t: handed.append(t.clone()) or t)  # type: ignore[func-returns-value]
    first = iter(handed)
    both = SecondMoments().measure(model, layers, batches(4)[1:], loss, lambda t: t + next(first))
    assert both.num_samples == whole.num_samples
    for name, moments in whole.layers.items():
        for part, tensor in moments.tensors().items():
            assert_same(both.layers[name].tensors()[part], tensor, 1e-6)


def test_samples_are_counted_exactly_whatever_the_default_dtype() -> None:
    # A model under `bf16-true` is built, and factorised, under this default.
    model = nn.Linear(2, 1)
    x = torch.randn(257, 2, generator=torch.Generator().manual_seed(0))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = SecondMoments().measure(
            model, {"": model}, [x], lambda batch: model(batch).square().sum(1), Tensor.clone
        )
    finally:
        torch.set_default_dtype(before)
    assert found.num_samples == 257


def test_a_loss_that_depends_on_no_layer_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    model = encoder()
    layers, loss = TargetSelector().select(model), classification_loss(model)
    found = SecondMoments().measure(model, layers, batches(), lambda batch: loss(batch).detach())
    assert all(moments.is_zero for moments in found.layers.values())
    told = [record.getMessage() for record in caplog.records if "depends on none" in record.getMessage()]
    assert len(told) == 1
    assert f"none of {len(layers)} layers, e.g. {next(iter(layers))!r}" in told[0]


def test_a_layer_that_no_loss_depends_on_is_zero() -> None:
    model = encoder()
    layers = {**TargetSelector().select(model), "unused": nn.Linear(4, 3)}
    loss = classification_loss(model)
    alone = SecondMoments().measure(model, {"unused": layers["unused"]}, batches(), loss)
    assert alone.layers["unused"].is_zero
    moments = SecondMoments().measure(model, layers, batches(), loss).layers["unused"]
    assert moments.is_zero
    assert moments.inputs is not None
    assert moments.inputs.shape == (4, 4)
    assert moments.outputs is not None
    assert moments.outputs.shape == (3, 3)


def test_nan_is_refused_with_the_layer() -> None:
    model = encoder()
    layers = TargetSelector().select(model)
    name = "bert.encoder.layer.1.output.dense"
    with torch.no_grad():
        layers[name].get_parameter("weight")[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=f"first seen in the output of layer '{name}'"):
        SecondMoments().measure(model, layers, batches(), classification_loss(model))


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("bert.encoder.layer.0.output.LayerNorm", "the input of layer 'bert.encoder.layer.1.attention.self.query'"),
        ("classifier", "what follows the layers to factorise"),
    ],
)
def test_activations_that_are_nan_are_refused_with_the_layer_that_gets_them(part: str, expected: str) -> None:
    model = encoder()
    layers = TargetSelector().select(model)
    with torch.no_grad():
        model.get_submodule(part).get_parameter("weight").view(-1)[0] = float("nan")
    with pytest.raises(NonFiniteError, match=f"loss of a calibration batch .* {expected}"):
        SecondMoments().measure(model, layers, batches(), classification_loss(model))
    assert not any(module._forward_hooks for module in model.modules())


def test_the_model_is_left_as_it_was() -> None:
    model = encoder().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    SecondMoments().measure(model, TargetSelector().select(model), batches(), classification_loss(model))
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_sums_are_gone_once_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without a collection of garbage: groups of layers are measured one after the other within a bound of memory.
    alive: list[weakref.ref[Tensor]] = []

    class Watched(GramSum):
        def __init__(self, size: int, device: torch.device, diagonal: bool = False, block_size: int | None = None):
            super().__init__(size, device, diagonal, block_size=block_size)
            alive.append(weakref.ref(self.total))

    monkeypatch.setattr(second_moments, "GramSum", Watched)
    model = encoder()
    gc.disable()
    try:
        SecondMoments().measure(model, TargetSelector().select(model), batches(2), classification_loss(model))
        assert alive
        assert not any(total() is not None for total in alive)
    finally:
        gc.enable()


def test_bytes_and_groups() -> None:
    shape = LinearShape(30, 20)
    assert SecondMoments().bytes(shape) == 8 * (900 + 400)
    assert SecondMoments(inputs="diagonal", outputs="none").bytes(shape) == 8 * 20
    assert SecondMoments(inputs=5, outputs=10).bytes(shape) == 8 * (4 * 25 + 3 * 100)
    shapes = dict.fromkeys("abcde", shape)
    one = SecondMoments().bytes(shape) / 2**30
    assert SecondMoments().groups(shapes, None) == [list("abcde")]
    assert SecondMoments().groups(shapes, 2.5 * one) == [["a", "b"], ["c", "d"], ["e"]]
    with pytest.raises(MemoryBoundError, match="'a'"):
        SecondMoments().groups(shapes, 0.9 * one)


def test_bad_options_are_refused() -> None:
    with pytest.raises(RangeError, match=r"importance\.inputs"):
        SecondMoments(inputs="half")  # type: ignore[arg-type]
    with pytest.raises(RangeError, match=r"importance\.outputs"):
        SecondMoments(outputs=0)


def test_blocks_that_do_not_divide_a_layer_are_refused_with_the_layer() -> None:
    model = encoder()
    layers = TargetSelector().select(model)
    with pytest.raises(RangeError, match=r"block_size=24 is out of range.*divisor of 32.*query"):
        SecondMoments(24, 24).measure(model, layers, batches(), classification_loss(model))


def test_torchs_own_encoder_is_measured_layer_by_layer_where_padding_would_make_nested_tensors() -> None:
    class Texts(nn.Module):
        def __init__(self, nested: bool) -> None:
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
                self.body, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested), nn.Linear(16, 3)

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            logits: Tensor = self.head(self.body(x, src_key_padding_mask=padding)[:, 0])
            return logits

    x = torch.randn(6, 5, 16, generator=torch.Generator().manual_seed(1))
    batch = {"x": x, "padding": torch.arange(5) >= torch.tensor([5, 3, 4, 2, 5, 3])[:, None], "y": torch.arange(6) % 3}
    found = []
    for nested in (True, False):
        model = Texts(nested)
        layers = {name: part for name, part in model.named_modules() if name.endswith(("linear1", "linear2"))}

        def loss(given: Batch, model: Texts = model) -> Tensor:
            return F.cross_entropy(model(given["x"], given["padding"]), given["y"], reduction="none")

        found.append(SecondMoments().measure(model, layers, [batch], loss).layers)
    assert torch.backends.mha.get_fastpath_enabled()
    for name, moments in found[1].items():
        for part, tensor in moments.tensors().items():
            torch.testing.assert_close(found[0][name].tensors()[part], tensor)
