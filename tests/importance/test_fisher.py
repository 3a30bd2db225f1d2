import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    DebertaConfig,
    XLNetConfig,
)

from lowrank_pl.errors.numerics import NonFiniteError
from lowrank_pl.importance import Fisher, FisherKind, empirical_fisher
from lowrank_pl.importance.fisher import Batch
from lowrank_pl.importance.squares import AxisSquares
from lowrank_pl.surgery import TargetSelector
from tests.importance.reference import (
    assert_same,
    classification_loss,
    reference_fisher,
    single_samples,
    token_loss,
)
from tests.support.tiny import FAMILIES, VOCAB
from tests.surgery.encoders import padded_batch, tiny_model

LENGTHS = (9, 4, 7, 12)


def labelled_batch(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> dict[str, Tensor]:
    return {**padded_batch(lengths, seed), "labels": torch.arange(len(lengths)) % 3}


def halves(batch: Batch) -> list[dict[str, Tensor]]:
    middle = len(batch["labels"]) // 2
    return [{key: v[:middle] for key, v in batch.items()}, {key: v[middle:] for key, v in batch.items()}]


def measure(model: nn.Module, batches: list[dict[str, Tensor]], kind: FisherKind = FisherKind.FULL) -> Fisher:
    return empirical_fisher(model, TargetSelector().select(model), batches, classification_loss(model), kind)


def full(fisher: Fisher, name: str) -> Tensor:
    result = fisher.layers[name].full
    assert result is not None
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_squared_gradients_of_single_unpadded_samples(family: str) -> None:
    # In float64, because MobileBERT's gradients reach its first layers at 1e-9 of the loss; the sums are float32.
    model, batch = tiny_model(family).double(), labelled_batch()
    layers = TargetSelector().select(model)
    expected = reference_fisher(layers, single_samples(batch), classification_loss(model))
    whole = measure(model, [batch])
    sums = measure(model, halves(batch), FisherKind.SUMS)
    assert list(whole.layers) == list(sums.layers) == list(layers)
    assert whole.num_samples == sums.num_samples == len(LENGTHS)
    for name, reference in expected.items():
        assert_same(full(whole, name), reference)
        assert_same(whole.layers[name].input_sums, reference.sum(0))
        assert_same(whole.layers[name].output_sums, reference.sum(1))
        assert sums.layers[name].full is None
        assert_same(sums.layers[name].input_sums, reference.sum(0))
        assert_same(sums.layers[name].output_sums, reference.sum(1))


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "modernbert"])
def test_token_labels_and_ignored_tokens(family: str) -> None:
    model, batch = tiny_model(family, "token"), padded_batch()
    labels = batch["input_ids"] % 3
    batch["labels"] = torch.where(batch["attention_mask"] == 1, labels, -100)
    layers = TargetSelector().select(model)
    expected = reference_fisher(layers, single_samples(batch), token_loss(model))
    fisher = empirical_fisher(model, layers, [batch], token_loss(model))
    for name, reference in expected.items():
        assert_same(full(fisher, name), reference)


def test_a_layer_called_at_every_depth_is_summed_before_it_is_squared() -> None:
    model, batch = tiny_model("albert"), labelled_batch()
    layers = TargetSelector().select(model)
    calls: dict[str, int] = dict.fromkeys(layers, 0)

    def count(name: str) -> None:
        calls[name] += 1

    handles = [layer.register_forward_hook(lambda *_, name=name: count(name)) for name, layer in layers.items()]
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for handle in handles:
        handle.remove()
    assert set(calls.values()) == {2}
    expected = reference_fisher(layers, single_samples(batch), classification_loss(model))
    fisher = measure(model, [batch])
    for name, reference in expected.items():
        assert_same(full(fisher, name), reference)


def fresh(config: Any) -> nn.Module:
    """A random sequence classifier; the global random state stays where it was."""
    config.num_labels = 3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = AutoModelForSequenceClassification.from_config(config)
    return model.eval()


def xlnet() -> nn.Module:
    return fresh(XLNetConfig(vocab_size=len(VOCAB), d_model=32, n_layer=2, n_head=2, d_inner=64))


def deberta() -> nn.Module:
    """The first version of DeBERTa, whose scores of positions are broadcast rather than repeated."""
    config = {**FAMILIES["bert"], "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    return fresh(DebertaConfig(vocab_size=len(VOCAB), **config))


@pytest.mark.parametrize("make", [xlnet, deberta, *(partial(tiny_model, family) for family in FAMILIES)])
def test_as_many_samples_as_tokens(make: Callable[[], nn.Module]) -> None:
    # XLNet puts the tokens first: the size of its first dimension is that of the batch here, and is not the batch.
    model, batch = make().double(), labelled_batch((6, 4, 5, 6, 3, 6))
    assert batch["input_ids"].shape == (6, 6)
    layers, loss = TargetSelector().select(model), classification_loss(model)
    padded = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(6)]
    expected = reference_fisher(layers, padded, loss)
    fisher = measure(model, [batch])
    for name, reference in expected.items():
        assert_same(full(fisher, name), reference)


def test_samples_that_share_relative_positions_are_measured_together(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = tiny_model("deberta-v2"), labelled_batch()
    sizes: list[int] = []

    def record(self: AxisSquares, x: Tensor, g: Tensor) -> None:
        sizes.append(len(x))

    monkeypatch.setattr(AxisSquares, "add", record)
    with caplog.at_level(logging.INFO, logger="lowrank_pl"):
        measure(model, [batch], FisherKind.SUMS)
        assert "measuring in vectorised passes" in caplog.text
        assert set(sizes) == {len(LENGTHS)}
        caplog.clear()
        measure(tiny_model("bert"), [batch], FisherKind.SUMS)
        assert caplog.text == ""


def test_a_first_batch_of_one_sample_does_not_hide_the_sharing() -> None:
    model, batch = tiny_model("deberta-v2"), labelled_batch()
    one, rest = {k: v[:1] for k, v in batch.items()}, {k: v[1:] for k, v in batch.items()}
    layers = TargetSelector().select(model)
    expected = reference_fisher(layers, single_samples(batch), classification_loss(model))
    fisher = measure(model, [one, rest])
    assert fisher.num_samples == len(LENGTHS)
    for name, reference in expected.items():
        assert_same(full(fisher, name), reference)


def test_the_square_of_the_batch_gradient_is_something_else() -> None:
    model, batch = tiny_model("bert"), labelled_batch()
    layers = TargetSelector().select(model)
    name = "bert.encoder.layer.0.output.dense"
    (gradient,) = torch.autograd.grad(classification_loss(model)(batch).mean(), [layers[name].get_parameter("weight")])
    exact = full(measure(model, [batch]), name)
    with pytest.raises(AssertionError):
        assert_same(gradient**2, exact, tolerance=0.1)
    # By the Cauchy-Schwarz inequality the squared mean never exceeds the mean of the squares.
    assert bool((gradient**2 <= exact * (1 + 1e-4) + 1e-12).all())


def test_splitting_into_batches_changes_nothing() -> None:
    model, batch = tiny_model("bert"), labelled_batch()
    whole, parts = measure(model, [batch]), measure(model, halves(batch))
    for name in whole.layers:
        assert_same(full(parts, name), full(whole, name))


def test_duplicating_every_sample_changes_nothing() -> None:
    model, batch = tiny_model("bert"), labelled_batch()
    once, twice = measure(model, [batch]), measure(model, [batch, batch])
    assert twice.num_samples == 2 * once.num_samples
    for name in once.layers:
        assert_same(full(twice, name), full(once, name))


def test_doubling_the_loss_multiplies_by_four() -> None:
    model, batch = tiny_model("bert"), labelled_batch()
    layers, loss = TargetSelector().select(model), classification_loss(model)
    once = empirical_fisher(model, layers, [batch], loss)
    twice = empirical_fisher(model, layers, [batch], lambda b: 2 * loss(b))
    for name in layers:
        assert_same(full(twice, name), 4 * full(once, name))


def test_two_processes_combine_to_the_whole_with_one_reduction_each() -> None:
    model, batch = tiny_model("bert"), labelled_batch((9, 4, 7))
    layers, loss = TargetSelector().select(model), classification_loss(model)
    whole = empirical_fisher(model, layers, [batch], loss, FisherKind.SUMS)
    first, second = halves(batch)  # one sample and two: the sizes differ
    sent: list[Tensor] = []

    def record(tensor: Tensor) -> Tensor:
        sent.append(tensor.clone())
        return tensor

    empirical_fisher(model, layers, [first], loss, FisherKind.SUMS, record)
    assert len(sent) == 1
    assert sent[0].ndim == 1

    def add_first(tensor: Tensor) -> Tensor:
        sent.append(tensor.clone())
        return tensor + sent[0]

    combined = empirical_fisher(model, layers, [second], loss, FisherKind.SUMS, add_first)
    assert len(sent) == 2
    assert combined.num_samples == whole.num_samples == 3
    for name, layer in whole.layers.items():
        assert_same(combined.layers[name].input_sums, layer.input_sums)
        assert_same(combined.layers[name].output_sums, layer.output_sums)


def test_a_process_without_samples_gets_what_the_others_measured() -> None:
    model, batch = tiny_model("bert"), labelled_batch()
    layers, loss = TargetSelector().select(model), classification_loss(model)
    sent: list[Tensor] = []

    def send(tensor: Tensor) -> Tensor:
        sent.append(tensor.clone())
        return tensor

    whole = empirical_fisher(model, layers, [batch], loss, reduce_sum=send)
    combined = empirical_fisher(model, layers, [], loss, reduce_sum=lambda t: t + sent[0])
    assert combined.num_samples == whole.num_samples
    for name in layers:
        assert_same(full(combined, name), full(whole, name))


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("family", ["bert", "deberta-v2"])
def test_the_model_is_left_as_it_was(family: str, fails: bool) -> None:
    model = tiny_model(family).train()
    names = list(TargetSelector().select(model))
    model.get_submodule(names[0]).eval()
    parameters = list(model.parameters())
    for parameter in parameters[::2]:
        parameter.requires_grad_(False)
    parameters[1].grad = kept = torch.full_like(parameters[1], 3.0)
    modes = {name: module.training for name, module in model.named_modules()}
    flags = [parameter.requires_grad for parameter in parameters]
    values = [parameter.detach().clone() for parameter in parameters]
    assert set(modes.values()) == {True, False}
    if fails:
        with pytest.raises(RuntimeError, match="on purpose"), failing_in_the_last_layer(model):
            measure(model, [labelled_batch()])
    else:
        measure(model, [labelled_batch()])
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert [parameter.requires_grad for parameter in parameters] == flags
    assert parameters[1].grad is kept
    assert torch.equal(kept, torch.full_like(kept, 3.0))
    assert all(parameter.grad is None for i, parameter in enumerate(parameters) if i != 1)
    assert all(torch.equal(now, then) for now, then in zip(parameters, values, strict=True))
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks


@contextmanager
def failing_in_the_last_layer(model: nn.Module) -> Iterator[None]:
    def fail(*_: object) -> None:
        raise RuntimeError("on purpose")

    handle = model.get_submodule("classifier").register_forward_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def test_dropout_is_off_and_the_random_state_stays() -> None:
    model, batch = tiny_model("bert"), labelled_batch()
    expected = measure(model, [batch])
    state = torch.get_rng_state()
    given = measure(model.train(), [batch])
    assert torch.equal(torch.get_rng_state(), state)
    for name in expected.layers:
        assert torch.equal(full(given, name), full(expected, name))


def test_a_wholly_frozen_model_is_measured_all_the_same() -> None:
    model, batch = tiny_model("bert"), labelled_batch()
    expected = measure(model, [batch])
    given = measure(model.requires_grad_(False), [batch])
    for name in expected.layers:
        assert torch.equal(full(given, name), full(expected, name))


@pytest.mark.parametrize("kind", FisherKind)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_works_from_under_no_grad_and_inference_mode(
    context: type[torch.no_grad] | type[torch.inference_mode], kind: FisherKind
) -> None:
    model, batch = tiny_model("bert"), labelled_batch()
    expected = measure(model, [batch], kind)
    with context():
        given = measure(model, [batch], kind)
    for name, layer in expected.layers.items():
        assert torch.equal(given.layers[name].input_sums, layer.input_sums)


@pytest.mark.parametrize("kind", FisherKind)
def test_half_precision_models_give_finite_float32(kind: FisherKind) -> None:
    batch = labelled_batch()
    exact = measure(tiny_model("bert"), [batch], kind)
    fisher = measure(tiny_model("bert").to(torch.bfloat16), [batch], kind)
    for name, layer in fisher.layers.items():
        assert layer.input_sums.dtype is torch.float32
        assert bool(torch.isfinite(layer.input_sums).all())
        assert_same(layer.input_sums, exact.layers[name].input_sums, tolerance=0.3)


def test_samples_of_several_processes_are_counted_exactly_whatever_the_default_dtype() -> None:
    model = nn.Linear(2, 1)
    x = torch.randn(257, 2, generator=torch.Generator().manual_seed(0))
    found = []
    before = torch.get_default_dtype()
    for dtype in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            loss = partial(lambda model, batch: model(batch).square().sum(1), model)
            found.append(empirical_fisher(model, {"": model}, [x], loss, reduce_sum=Tensor.clone))
        finally:
            torch.set_default_dtype(before)
    assert [fisher.num_samples for fisher in found] == [257, 257]
    assert torch.equal(found[0].layers[""].input_sums, found[1].layers[""].input_sums)


@pytest.mark.parametrize("kind", FisherKind)
def test_sums_are_float32_whatever_the_default_dtype(kind: FisherKind) -> None:
    # Trainers with true half precision change torch's default dtype.
    model, batch = tiny_model("bert").to(torch.bfloat16), labelled_batch((9, 40))
    expected = measure(model, [batch], kind)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        fisher = measure(model, [batch], kind)
    finally:
        torch.set_default_dtype(before)
    for name, layer in fisher.layers.items():
        assert layer.output_sums.dtype is torch.float32
        assert_same(layer.output_sums, expected.layers[name].output_sums, 1e-2)


def test_sums_that_round_below_zero_are_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    # Gram products subtract where the exact sum is zero; a negative importance would be refused later on.
    def add(self: AxisSquares, x: Tensor, g: Tensor) -> None:
        self.input_sums -= 1e-12
        self.output_sums += 1.0

    monkeypatch.setattr(AxisSquares, "add", add)
    for layer in measure(tiny_model("bert"), [labelled_batch((4,))], FisherKind.SUMS).layers.values():
        assert torch.equal(layer.input_sums, torch.zeros_like(layer.input_sums))
        assert torch.equal(layer.output_sums, torch.ones_like(layer.output_sums))


def test_a_layers_information_moves_between_devices_with_all_its_parts() -> None:
    for kind in FisherKind:
        layer = next(iter(measure(tiny_model("bert"), [labelled_batch((4,))], kind).layers.values()))
        moved = layer.to("meta")
        assert {moved.input_sums.device.type, moved.output_sums.device.type} == {"meta"}
        assert (moved.full is None) is (kind is FisherKind.SUMS)
        assert moved.full is None or moved.full.device.type == "meta"


def test_no_sample_gives_zero() -> None:
    fisher = measure(tiny_model("bert"), [])
    assert fisher.num_samples == 0
    assert not any(bool(full(fisher, name).any()) for name in fisher.layers)


def test_a_loss_that_is_nan_is_refused() -> None:
    model = tiny_model("bert")
    broken = model.get_submodule("bert.encoder.layer.1.intermediate.dense")
    assert isinstance(broken, nn.Linear)
    broken.weight.data[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="the loss of a calibration batch contains 4 NaN or Inf entries"):
        measure(model, [labelled_batch()])


class TwoLayers(nn.Module):
    """`[b, 4] → [b]`."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 1)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x).tanh())
        return out.squeeze(-1)

    def layers(self) -> dict[str, nn.Linear]:
        return {"first": self.first, "second": self.second}


@pytest.mark.parametrize("kind", FisherKind)
def test_gradients_that_overflow_name_the_layer(kind: FisherKind) -> None:
    model = TwoLayers()
    # The loss is finite; the gradients of the first layer are too large to be squared in float32.
    model.second.weight.data.fill_(1e25)
    batch = {"x": torch.full((2, 4), 1e-3)}
    with pytest.raises(NonFiniteError, match="gradient of layer 'first' contains"):
        empirical_fisher(model, model.layers(), [batch], lambda b: model(b["x"]), kind)


@pytest.mark.parametrize("kind", FisherKind)
def test_a_layer_that_no_loss_depends_on_has_zero_information(kind: FisherKind) -> None:
    model = TwoLayers()
    batch = {"x": torch.randn(3, 4, generator=torch.Generator().manual_seed(1))}

    def losses(b: Batch) -> Tensor:
        model.first(b["x"])
        result: Tensor = model.second(b["x"]).squeeze(-1)
        return result

    fisher = empirical_fisher(model, model.layers(), [batch], losses, kind)
    assert not bool(fisher.layers["first"].output_sums.any())
    alone = empirical_fisher(model, {"first": model.first}, [batch], losses, kind)
    assert not bool(alone.layers["first"].output_sums.any())
    torch.testing.assert_close(fisher.layers["second"].input_sums, (batch["x"] ** 2).mean(0))


def test_hand_case() -> None:
    # L_d = y_d² / 2 with y = w·x: the gradient of sample d is y_d x_d.
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, 2.0]])
    batch = {"x": torch.tensor([[1.0, 1.0], [2.0, 0.0]])}
    fisher = empirical_fisher(layer, {"w": layer}, [batch], lambda b: layer(b["x"]).squeeze(-1) ** 2 / 2)
    # Gradients (3, 3) and (4, 0): squares (9, 9) and (16, 0), mean (12.5, 4.5).
    torch.testing.assert_close(full(fisher, "w"), torch.tensor([[12.5, 4.5]]))


@pytest.mark.cuda
@pytest.mark.parametrize("kind", FisherKind)
@pytest.mark.parametrize("family", ["bert", "albert", "deberta-v2"])
@pytest.mark.parametrize("lengths", [(9, 4, 7), (90, 100, 8)])  # short: Gram products; long: direct ones
def test_an_accelerator_agrees_with_the_cpu(kind: FisherKind, family: str, lengths: tuple[int, ...]) -> None:
    model, batch = tiny_model(family), labelled_batch(lengths)
    expected = measure(model, [batch], kind)
    given = measure(model.cuda(), [{key: value.cuda() for key, value in batch.items()}], kind)
    for name, layer in expected.layers.items():
        assert given.layers[name].input_sums.device.type == "cuda"
        assert_same(given.layers[name].input_sums.cpu(), layer.input_sums, 1e-4)
        assert_same(given.layers[name].output_sums.cpu(), layer.output_sums, 1e-4)


@pytest.mark.parametrize("kind", FisherKind)
def test_a_model_that_writes_into_an_output_in_place(kind: FisherKind) -> None:
    class InPlace(nn.Module):
        def __init__(self, write: bool) -> None:
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.write, self.first, self.later = write, nn.Linear(6, 5), nn.Linear(5, 6)

        def losses(self, batch: Batch) -> Tensor:
            out: Tensor = self.later(self.first(batch["x"]).tanh())
            out = out.mul_(3).relu_() if self.write else (out * 3).relu()
            return out.square().sum((1, 2))

    batch = {"x": torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(1))}
    given, expected = (
        empirical_fisher(m, {"first": m.first, "later": m.later}, [batch, batch], m.losses, kind)
        for m in (InPlace(True), InPlace(False))
    )
    for name, layer in expected.layers.items():
        assert_same(given.layers[name].input_sums, layer.input_sums)
        assert_same(given.layers[name].output_sums, layer.output_sums)
