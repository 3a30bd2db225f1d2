"""`lowrank_pl.compress`: any module, any batches, no run."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lowrank_pl
from lowrank_pl.allocation import LayerOverride
from lowrank_pl.core.kronecker import KroneckerGroups
from lowrank_pl.errors.arguments import MissingArgumentError
from lowrank_pl.errors.numerics import BatchShapeError, LossShapeError
from lowrank_pl.errors.run import CalibrationError, NothingToCompressError
from lowrank_pl.errors.targets import NoTargetError, SeveralDevicesError
from lowrank_pl.importance.batches import Batch
from lowrank_pl.nn import LowRankLinear
from lowrank_pl.strategies import (
    FWSVD,
    SVD,
    Calibration,
    CompressionStrategy,
    KroneckerSVD,
    RankDyna,
    Recalibration,
    Refit,
)
from lowrank_pl.surgery import TargetSelector, read_layout

COUNT = 24


class Network(nn.Module):
    """Two blocks of torch's own with dropout, and a head."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.5, batch_first=True)
            self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(x).mean(1))
        return y


class Pair(NamedTuple):
    """What a data set of somebody's gives."""

    x: Tensor
    y: Tensor


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(COUNT, 5, 16, generator=generator), torch.randint(3, (COUNT,), generator=generator)


def pair_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def dict_loss(model: nn.Module, batch: Any) -> Tensor:
    assert batch["note"] == "of all samples"
    return F.cross_entropy(model(batch["nested"]["x"]), batch["y"], reduction="none")


def pairs(size: int = 8) -> list[tuple[Tensor, Tensor]]:
    x, y = data()
    return list(zip(x.split(size), y.split(size), strict=True))


def made(**arguments: Any) -> FWSVD:
    return FWSVD(keep_ratio=0.5, calibration=Calibration(cache=False, **arguments))


def state_after(batches: Any, loss: Any = pair_loss, strategy: CompressionStrategy | None = None) -> dict[str, Tensor]:
    model = Network()
    lowrank_pl.compress(model, batches, loss, strategy or made())
    return model.state_dict()


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, atol=1e-4), name


def test_a_module_of_torch_alone_is_factorised_in_place() -> None:
    model = Network()
    record = lowrank_pl.compress(model, pairs(), pair_loss, KroneckerSVD(keep_ratio=0.5))
    assert record.method == "KroneckerSVD"
    assert 0.4 < record.keep_ratio <= 0.5
    assert record.options["calibration_samples"] == COUNT
    assert {layer.name for layer in record.layers if layer.kind == "low_rank"} == set(read_layout(model).modules)
    assert not any("no loss depends" in note for note in record.notes)  # torch's fast path would bypass hooks
    assert isinstance(model.body.layers[1].linear1, LowRankLinear)


def test_modes_random_states_and_gradients_are_as_before() -> None:
    model = Network().train()
    model.body.layers[0].eval()
    model.head.weight.requires_grad_(False)
    modes = {name: part.training for name, part in model.named_modules()}
    torch.manual_seed(7)
    states = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())  # type: ignore[index]
    loader = DataLoader(TensorDataset(*data()), batch_size=8, shuffle=True)  # draws from the global state
    lowrank_pl.compress(model, loader, pair_loss, made())
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())  # type: ignore[index]
    for name, part in model.named_modules():
        assert part.training == modes.get(name, modes[name.rpartition(".")[0]] if "linear" in name else None)
    assert not model.head.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    pair_loss(model, pairs()[0]).sum().backward()  # trains on
    assert model.body.layers[1].linear1.left.weight.grad is not None


def test_it_works_under_no_grad_and_inference_mode() -> None:
    for mode in (torch.no_grad, torch.inference_mode):
        model = Network()
        with mode():
            lowrank_pl.compress(model, pairs(), pair_loss, made())
        assert not any(parameter.is_inference() for parameter in model.parameters())
        assert_alike(model.state_dict(), state_after(pairs()))


STRUCTURES: dict[str, tuple[Callable[[], Any], Callable[[Any, Batch], Tensor]]] = {
    "generator": (lambda: (pair for pair in pairs()), pair_loss),
    "loader": (lambda: DataLoader(TensorDataset(*data()), batch_size=6), pair_loss),
    "lists": (lambda: [list(pair) for pair in pairs()], pair_loss),
    "named tuples": (lambda: [Pair(*pair) for pair in pairs()], lambda model, b: pair_loss(model, (b.x, b.y))),
    "nested": (
        lambda: [
            {"nested": {"x": x}, "y": y, "note": "of all samples", "scale": torch.tensor(2.0)} for x, y in pairs()
        ],
        dict_loss,
    ),
    "a tensor": (
        lambda: [torch.cat([x.flatten(1), y[:, None].float()], 1) for x, y in pairs()],
        lambda model, b: F.cross_entropy(model(b[:, :-1].view(-1, 5, 16)), b[:, -1].long(), reduction="none"),
    ),
}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_batches_of_every_structure_give_the_same(structure: str) -> None:
    batches, loss = STRUCTURES[structure]
    assert_alike(state_after(batches(), loss), state_after(pairs()))


def test_batch_sizes_do_not_matter_and_a_choice_of_samples_does() -> None:
    whole = state_after(pairs())
    assert_alike(state_after(pairs(), strategy=made(batch_size=3)), whole)
    chosen = lowrank_pl.compress(Network(), pairs(), pair_loss, made(max_samples=10))
    assert chosen.options["calibration_samples"] == 10


def test_no_batch_is_left_without_samples_by_a_choice() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        assert len(batch[0]) > 0  # few models take such a batch
        return pair_loss(model, batch)

    few: dict[str, Any] = {"refit": Refit(max_samples=5), "recalibration": Recalibration(max_samples=5)}
    strategy = KroneckerSVD(keep_ratio=0.5, calibration=Calibration(cache=False), **few)
    record = lowrank_pl.compress(Network(), pairs(1), loss, strategy)
    assert record.notes[0].endswith("were refitted on 5 samples")
    assert "on 5 outputs" in record.notes[1]


class Flat(nn.Module):
    """Layers that see tokens without a dimension for samples; branches on values if asked to."""

    def __init__(self, flat: bool, branching: bool, by_keyword: bool = False) -> None:
        super().__init__()
        self.flat, self.branching, self.by_keyword = flat, branching, by_keyword
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
            self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(0, 1) if self.flat else x
        for layer in self.layers:
            y = (layer(input=y) if self.by_keyword else layer(y)).tanh()
        if self.branching and float(y.detach().sum()) == 0:
            raise AssertionError
        logits: Tensor = self.head(y.view(*x.shape[:2], -1).mean(1))
        return logits


@pytest.mark.parametrize(("branching", "told"), [(False, "in vectorised passes"), (True, "a backward pass per sample")])
def test_tuples_go_every_way_through_a_model(branching: bool, told: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "lowrank_pl")
    model, expected = Flat(True, branching), Flat(False, False)
    lowrank_pl.compress(model, pairs(), pair_loss, made())
    assert told in caplog.text
    lowrank_pl.compress(expected, pairs(), pair_loss, made())
    assert_alike(model.state_dict(), expected.state_dict())


@pytest.mark.parametrize("flat", [True, False])
def test_layers_may_be_called_by_keyword(flat: bool) -> None:
    model, expected = Flat(flat, False, by_keyword=True), Flat(flat, False)
    for network in (model, expected):
        strategy = KroneckerSVD(keep_ratio=0.5, calibration=Calibration(cache=False))
        lowrank_pl.compress(network, pairs(), pair_loss, strategy)
    assert_alike(model.state_dict(), expected.state_dict())


def test_a_method_without_data_needs_none() -> None:
    record = lowrank_pl.compress(Network(), None, None, SVD(keep_ratio=0.5))
    assert record.keep_ratio <= 0.5


def test_the_head_is_recalibrated_on_the_same_samples_in_the_same_order() -> None:
    loader = DataLoader(TensorDataset(*data()), batch_size=8, shuffle=True)
    strategy = KroneckerSVD(keep_ratio=0.3, calibration=Calibration(cache=False), recalibration=Recalibration())
    model = Network()
    dense = Network().eval()
    before = dense(data()[0]).detach()
    record = lowrank_pl.compress(model, loader, pair_loss, strategy)
    assert "recalibrated on 24 outputs" in record.notes[-1]
    plain = Network()
    lowrank_pl.compress(plain, pairs(), pair_loss, KroneckerSVD(keep_ratio=0.3, calibration=Calibration(cache=False)))

    def divergence(found: nn.Module) -> float:
        log = found.eval()(data()[0]).detach().log_softmax(1)
        return float(F.kl_div(log, before.softmax(1), reduction="batchmean"))

    assert divergence(model) < divergence(plain)


def test_a_head_that_is_factorised_itself_is_recalibrated() -> None:
    options: dict[str, Any] = {"targets": TargetSelector(["*"]), "calibration": Calibration(cache=False)}
    rank = [LayerOverride("head", rank=1)]
    models: list[Any] = []
    for recalibration in (False, True):
        models.append(Network())
        strategy = KroneckerSVD(keep_ratio=0.5, overrides=rank, recalibration=recalibration, **options)
        record = lowrank_pl.compress(models[-1], pairs(), pair_loss, strategy)
    plain, scaled = (model.head for model in models)
    assert isinstance(scaled, LowRankLinear)
    assert "recalibrated" in record.notes[-1]
    assert not torch.equal(scaled.left.weight, plain.left.weight)
    assert torch.equal(scaled.right.weight, plain.right.weight)


def test_several_values_are_recalibrated_each_by_itself_where_that_is_said() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        distances: Tensor = model(batch[0]) - F.one_hot(batch[1], 3)
        return distances.square().mean(1)

    def distance(recalibration: Recalibration | None) -> float:
        model, dense = Network(), Network().eval()
        calibration = Calibration(cache=False)
        strategy = KroneckerSVD(keep_ratio=0.3, calibration=calibration, recalibration=recalibration)
        lowrank_pl.compress(model, pairs(), loss, strategy)
        return float((model.eval()(data()[0]) - dense(data()[0])).square().mean())

    plain, classes, values = map(distance, (None, Recalibration(), Recalibration(values=True)))
    assert values < plain
    assert values < classes
    assert Recalibration(values=True).options() == {"max_samples": 2048, "values": True}
    assert Recalibration().options() == {"max_samples": 2048}


def test_what_the_loss_holds_is_part_of_the_cache_s_key(tmp_path: Any) -> None:
    class Weighted:
        def __init__(self, weight: float) -> None:
            self.weight = torch.tensor([weight, 1.0, 1.0])

        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            return pair_loss(model, batch) * self.weight[batch[1]]

    def errors(weight: float, cache: bool) -> list[float | None]:
        calibration = Calibration(cache=cache, cache_dir=str(tmp_path))
        strategy = FWSVD(keep_ratio=0.5, calibration=calibration)
        record = lowrank_pl.compress(Network(), pairs(), Weighted(weight).loss, strategy)
        return [layer.weighted_error for layer in record.layers]

    plain = errors(1.0, True)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    assert errors(1.0, True) == plain
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    assert errors(50.0, True) == errors(50.0, False) != plain


def stopped(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("sequential", [False, True])
def test_an_interrupt_leaves_the_model_dense(sequential: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    # The factors of the last layer are asked for when those of the others are written.
    last = model.body.layers[1].linear2.out_features
    factors = KroneckerGroups.factors
    monkeypatch.setattr(
        KroneckerGroups, "factors", lambda self, rank: factors(self, rank) if len(self.left) != last else stopped()
    )
    strategy = KroneckerSVD(keep_ratio=0.5, calibration=Calibration(cache=False), sequential=sequential)
    with pytest.raises(KeyboardInterrupt):
        lowrank_pl.compress(model, pairs(), pair_loss, strategy)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_bad_input_is_refused_before_anything_is_changed() -> None:
    model = Network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CalibrationError, match=r"FWSVD needs calibration batches.*lowrank_pl\.compress"):
        lowrank_pl.compress(model, None, pair_loss, made())
    with pytest.raises(CalibrationError):
        lowrank_pl.compress(model, [], pair_loss, made())
    with pytest.raises(MissingArgumentError, match="the loss is missing"):
        lowrank_pl.compress(model, pairs(), None, made())
    with pytest.raises(LossShapeError, match=r"shape \[\]"):
        lowrank_pl.compress(model, pairs(), lambda m, b: pair_loss(m, b).mean(), made())
    with pytest.raises(BatchShapeError, match=r"\[8, 5, 16\], \[7\]"):
        lowrank_pl.compress(model, [(x, y[1:]) for x, y in pairs()], pair_loss, made())
    with pytest.raises(BatchShapeError, match="str"):
        lowrank_pl.compress(model, ["a text"], pair_loss, made())
    with pytest.raises(NothingToCompressError):
        lowrank_pl.compress(model, pairs(), pair_loss, RankDyna(keep_ratio=0.5))
    with pytest.raises(NoTargetError):
        lowrank_pl.compress(model, None, None, SVD(keep_ratio=0.5, targets=TargetSelector(include=["*nothing*"])))
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    model.head.to("meta")
    with pytest.raises(SeveralDevicesError, match="cpu, meta"):
        lowrank_pl.compress(model, pairs(), pair_loss, made())
