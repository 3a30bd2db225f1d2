"""b = 6 samples of a tiny encoder, unless a test says otherwise."""

import copy
import logging
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from lowrank_pl.errors.numerics import NonFiniteError
from lowrank_pl.importance import Fisher, FisherKind, SecondMoments, empirical_fisher
from lowrank_pl.importance.fisher import Batch, PerSampleLoss
from lowrank_pl.importance.squares import AxisSquares, FullSquares
from lowrank_pl.surgery import TargetSelector
from tests.importance.reference import assert_same, classification_loss
from tests.surgery.encoders import padded_batch, tiny_model

CPU_ERROR = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
Make = Callable[[], Exception]
OUT_OF_MEMORY: list[Make] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    lambda: RuntimeError(CPU_ERROR),
    lambda: RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
]


def labelled(size: int = 6, seed: int = 0) -> dict[str, Tensor]:
    return {**padded_batch((9, 4, 7, 12, 5, 8)[:size], seed), "labels": torch.arange(size) % 3}


def measure(
    model: nn.Module, batches: list[dict[str, Tensor]], kind: FisherKind, loss: PerSampleLoss | None = None
) -> Fisher:
    layers = TargetSelector().select(model)
    return empirical_fisher(model, layers, batches, loss or classification_loss(model), kind, expected=12)


def assert_equal(given: Fisher, expected: Fisher) -> None:
    assert given.num_samples == expected.num_samples
    for name, layer in expected.layers.items():
        assert_same(given.layers[name].input_sums, layer.input_sums)
        assert_same(given.layers[name].output_sums, layer.output_sums)


def limited(model: nn.Module, at_most: int, error: Make, sizes: list[int]) -> PerSampleLoss:
    """A loss that does not fit into memory for more samples than `at_most`."""
    inner = classification_loss(model)

    def loss(batch: Batch) -> Tensor:
        sizes.append(len(batch["labels"]))
        if sizes[-1] > at_most:
            raise error()
        return inner(batch)

    return loss


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_batches_too_large_for_memory_are_halved_from_then_on(error: Make, caplog: pytest.LogCaptureFixture) -> None:
    model, batches = tiny_model("bert"), [labelled(), labelled(seed=1)]
    expected = measure(model, batches, FisherKind.SUMS)
    sizes: list[int] = []
    with caplog.at_level(logging.WARNING, logger="lowrank_pl"):
        given = measure(model, batches, FisherKind.SUMS, limited(model, 3, error, sizes))
    assert_equal(given, expected)
    # Two rehearsals, the failure, and four halves: the second batch is not tried whole.
    assert sizes == [2, 3, 6, 3, 3, 3, 3]
    (record,) = caplog.records
    assert "out of memory with 6 samples in a calibration batch: going on with 3" in record.getMessage()


@pytest.mark.parametrize("family", ["bert", "deberta-v2"])
@pytest.mark.parametrize("kind", FisherKind)
def test_memory_that_ends_in_the_backward_pass_counts_nothing_twice(
    family: str, kind: FisherKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    # After half of the layers have been added for the whole batch, and again for the first half.
    model, batches = tiny_model(family), [labelled(), labelled(seed=1)]
    expected = measure(model, batches, kind)
    squares = FullSquares if kind is FisherKind.FULL else AxisSquares
    inner, calls = squares.add, [0]

    def add(self: FullSquares | AxisSquares, x: Tensor, g: Tensor) -> None:
        calls[0] += 1
        if calls[0] in (6, 10):
            raise torch.OutOfMemoryError("CUDA out of memory")
        inner(self, x, g)  # type: ignore[arg-type]

    monkeypatch.setattr(squares, "add", add)
    assert_equal(measure(model, batches, kind), expected)
    assert calls[0] > 10


def test_a_single_sample_that_does_not_fit_is_an_error() -> None:
    model = tiny_model("bert")
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        measure(model, [labelled()], FisherKind.SUMS, limited(model, 0, OUT_OF_MEMORY[1], []))


def test_a_rehearsal_that_does_not_fit_leaves_single_samples(caplog: pytest.LogCaptureFixture) -> None:
    model, sizes = tiny_model("bert"), list[int]()
    expected = measure(model, [labelled()], FisherKind.SUMS)
    with caplog.at_level(logging.WARNING, logger="lowrank_pl"):
        given = measure(model, [labelled()], FisherKind.SUMS, limited(model, 1, OUT_OF_MEMORY[0], sizes))
    assert_equal(given, expected)
    assert sizes == [2, 1, 1, 1, 1, 1, 1]
    assert "memory is too short" in caplog.text


@pytest.mark.parametrize("size", [1e-5, 1.0, 300.0])  # the first as of a model that is sure of itself
def test_gradients_in_float16_neither_vanish_nor_overflow(size: float) -> None:
    exact = tiny_model("bert")
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.copy_(parameter.half())
    half = copy.deepcopy(exact).half()
    found = []
    for model in (exact, half):
        layers = TargetSelector().select(model)
        loss = partial(lambda inner, batch: size * inner(batch).float(), classification_loss(model))
        moments = SecondMoments().measure(model, layers, [labelled(), labelled(seed=1)], loss)
        found.append((moments.layers, measure(model, [labelled()], FisherKind.SUMS, loss).layers))
    for name, expected in found[0][0].items():
        for part, tensor in expected.tensors().items():
            assert_same(found[1][0][name].tensors()[part], tensor, 0.02)
        assert_same(found[1][1][name].input_sums, found[0][1][name].input_sums, 0.02)


def test_a_gradient_that_is_not_finite_in_float16_at_any_scale_names_the_layer() -> None:
    model = tiny_model("bert").half()
    inner = classification_loss(model)
    with pytest.raises(NonFiniteError, match=r"layer 'bert\.encoder\.layer\.1\.output\.dense'|second moment"):
        SecondMoments().measure(
            model, TargetSelector().select(model), [labelled()], lambda batch: 1e30 * inner(batch).float()
        )


def test_any_other_error_is_raised_as_it_is() -> None:
    model, inner = tiny_model("bert"), classification_loss(tiny_model("bert"))

    def loss(batch: Batch) -> Tensor:
        if len(batch["labels"]) > 3:
            raise RuntimeError("shapes do not match")
        return inner(batch)

    with pytest.raises(RuntimeError, match="shapes do not match"):
        measure(model, [labelled()], FisherKind.SUMS, loss)


class Shared(nn.Module):
    """Adds to every sample a projection of positions `[t, 4]` that all samples share; may branch on a value."""

    def __init__(self, branches: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.branches, self.positions, self.out = branches, nn.Linear(4, 4), nn.Linear(4, 1)
        self.embedding = torch.randn(5, 4, generator=generator)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def losses(self, batch: Batch) -> Tensor:
        x = batch["x"]
        if self.branches and x.sum() > 1e6:
            x = x * 2
        y = (x + self.positions(self.embedding)).tanh()
        result: Tensor = self.out(y).square().sum((1, 2))
        return result

    def layers(self) -> dict[str, nn.Linear]:
        return {"positions": self.positions, "out": self.out}


def batch_of(size: int, scale: float = 1.0) -> dict[str, Tensor]:
    return {"x": scale * torch.randn(size, 5, 4, generator=torch.Generator().manual_seed(1))}


def squared_gradients(model: Shared, batch: Batch) -> dict[str, Tensor]:
    sums = {name: torch.zeros_like(layer.weight) for name, layer in model.layers().items()}
    for x in batch["x"]:
        model.zero_grad()
        model.losses({"x": x[None]}).sum().backward()
        for name, layer in model.layers().items():
            assert layer.weight.grad is not None
            sums[name] += layer.weight.grad**2
    model.zero_grad()
    return {name: total / len(batch["x"]) for name, total in sums.items()}


@pytest.mark.parametrize("branches", [False, True])
def test_what_samples_share_has_a_gradient_per_sample(branches: bool, caplog: pytest.LogCaptureFixture) -> None:
    model, batch = Shared(branches), batch_of(4)
    expected = squared_gradients(model, batch)
    with caplog.at_level(logging.INFO, logger="lowrank_pl"):
        fisher = empirical_fisher(model, model.layers(), [batch], model.losses, expected=4)
    for name, reference in expected.items():
        given = fisher.layers[name].full
        assert given is not None
        assert_same(given, reference)
    if branches:  # the cost is told: how many passes, why, and about how long
        assert "a backward pass per sample, 4 in this process" in caplog.text
        assert "cannot be vectorised (RuntimeError: vmap:" in caplog.text
        assert "s for all; calibration.max_samples lowers it" in caplog.text
        assert all(record.levelno == logging.WARNING for record in caplog.records)
    else:
        assert "measuring in vectorised passes" in caplog.text


def test_a_nan_loss_in_a_vectorised_pass_is_refused() -> None:
    model = Shared(branches=False)
    with pytest.raises(NonFiniteError, match=r"the loss of a calibration batch contains 4 NaN or Inf entries \(first"):
        empirical_fisher(model, model.layers(), [batch_of(4, float("nan"))], model.losses)
