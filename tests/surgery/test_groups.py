"""n = 7 inputs, m = 5 outputs, capacity 5 unless a test says otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import SGD, Adafactor, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop

from lowrank_pl.errors.numerics import RankError
from lowrank_pl.errors.optimizer import HiddenOptimizerStateError, OptimizerStateError
from lowrank_pl.nn import LowRankLinear, SVDLinear
from lowrank_pl.surgery import keep_groups_, svd_layers
from tests.core.matrices import random_matrix

Make = Callable[[list[nn.Parameter]], Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "adamw": lambda p: AdamW(p, lr=0.05, weight_decay=0.1),
    "amsgrad": lambda p: Adam(p, lr=0.05, amsgrad=True),
    "nadam": lambda p: NAdam(p, lr=0.05),  # beside its step it keeps a second single number
    "sgd": lambda p: SGD(p, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
    "rmsprop": lambda p: RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: Adagrad(p, lr=0.05),
}
MEMORIES = {
    "adamw": {"exp_avg", "exp_avg_sq"},
    "amsgrad": {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
    "nadam": {"exp_avg", "exp_avg_sq"},
    "sgd": {"momentum_buffer"},
    "rmsprop": {"square_avg", "momentum_buffer", "grad_avg"},
    "adagrad": {"sum"},
}
KEPT = [0, 2, 3]


@pytest.fixture(params=list(OPTIMIZERS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def filled(capacity: int = 5) -> SVDLinear:
    layer = SVDLinear(7, 5, capacity, dtype=torch.float64)
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data.copy_(random_matrix(*parameter.shape, seed=seed, dtype=torch.float64))
    return layer


def train(layer: SVDLinear, *optimizers: Optimizer, steps: int = 3, seed: int = 10) -> None:
    for step in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        layer(random_matrix(4, 7, seed=seed + step, dtype=torch.float64)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()


def groups_first(layer: SVDLinear) -> dict[str, Tensor]:
    """`[c, …]` each, still sharing memory."""
    return {"left": layer.left.detach().mT, "sigma": layer.sigma.detach(), "right": layer.right.detach()}


def remembered(layer: SVDLinear, optimizer: Optimizer) -> dict[tuple[str, str], Tensor]:
    """What an optimizer remembers per group, `[c, …]` each, still sharing memory."""
    found = {}
    for part, parameter in (("left", layer.left), ("sigma", layer.sigma), ("right", layer.right)):
        for name, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                found[part, name] = value.mT if part == "left" else value
    return found


def those_kept(tensor: Tensor, shape: torch.Size) -> Tensor:
    """The kept groups along the dimension in which a smaller layer's tensor differs; all where none does."""
    for dim in range(tensor.ndim):
        if tensor.shape[dim] != shape[dim]:
            return tensor.index_select(dim, torch.tensor(KEPT))
    return tensor


def cloned(tensors: dict[Any, Tensor]) -> dict[Any, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def test_the_product_is_that_of_the_kept_groups() -> None:
    layer = filled()
    before = filled()
    expected = sum(
        torch.outer(before.left[:, k], before.right[k]).detach() * float(before.sigma[k].detach()) for k in KEPT
    )
    keep_groups_(layer, torch.tensor(KEPT))
    torch.testing.assert_close(layer.product().detach(), expected)
    assert (layer.rank, int(layer.active), layer.capacity) == (3, 3, 5)


def test_dropping_groups_without_effect_changes_no_output() -> None:
    layer, x = filled(), random_matrix(4, 7, seed=9, dtype=torch.float64)
    layer.sigma.data[[1, 4]] = 0
    before = layer(x)
    keep_groups_(layer, torch.tensor(KEPT))
    torch.testing.assert_close(layer(x), before)


def test_kept_groups_come_first_in_their_order_and_dropped_ones_are_zero() -> None:
    layer = filled()
    before = cloned(groups_first(layer))
    bias = layer.bias
    assert bias is not None
    unmoved = bias.detach().clone()
    keep_groups_(layer, torch.tensor(KEPT))
    for name, tensor in groups_first(layer).items():
        assert torch.equal(tensor[:3], before[name][KEPT]), name
        assert torch.count_nonzero(tensor[3:]) == 0, name
    assert torch.equal(bias, unmoved)


def test_parameters_stay_the_same_objects_in_the_same_place() -> None:
    layer = filled()
    before = [(name, id(p), p.data_ptr(), p.shape) for name, p in layer.named_parameters()]
    keep_groups_(layer, torch.tensor(KEPT))
    assert [(name, id(p), p.data_ptr(), p.shape) for name, p in layer.named_parameters()] == before
    assert all(p.requires_grad and p.is_leaf for p in layer.parameters())


def test_moments_follow_their_groups(kind: str) -> None:
    layer = filled()
    optimizer = OPTIMIZERS[kind](list(layer.parameters()))
    train(layer, optimizer)
    before = cloned(remembered(layer, optimizer))
    assert set(before) == {(part, name) for part in ("left", "sigma", "right") for name in MEMORIES[kind]}
    # A group is known by what the optimizer remembers of it: no two are alike, and none is nothing.
    for tensor in before.values():
        assert len({str(group.tolist()) for group in tensor}) == 5
    keep_groups_(layer, torch.tensor(KEPT), [optimizer])
    for key, tensor in remembered(layer, optimizer).items():
        assert torch.equal(tensor[:3], before[key][KEPT]), key
        assert torch.count_nonzero(tensor[3:]) == 0, key


def test_single_numbers_and_other_parameters_keep_what_is_remembered_of_them() -> None:
    layer = filled()
    other = nn.Linear(3, 2)
    optimizer = AdamW([*layer.parameters(), *other.parameters()])
    train(layer, optimizer)
    optimizer.zero_grad()
    other(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert layer.bias is not None
    untouched = [layer.bias, other.bias]
    before = [cloned(optimizer.state[parameter]) for parameter in untouched]
    keep_groups_(layer, torch.tensor(KEPT), [optimizer])
    for parameter, memory in zip(untouched, before, strict=True):
        assert set(memory) == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(optimizer.state[parameter][name], value) for name, value in memory.items())
    assert [float(optimizer.state[p]["step"]) for p in (layer.left, layer.sigma, layer.right)] == [3, 3, 3]


def test_afterwards_it_trains_like_a_layer_of_that_size(kind: str) -> None:
    layer, small = filled(), SVDLinear(7, 5, 3, dtype=torch.float64)
    optimizer, other = (OPTIMIZERS[kind](list(each.parameters())) for each in (layer, small))
    train(layer, optimizer)
    train(small, other)  # so that its memory has the right entries and its step counts are the same
    for mine, theirs in zip(small.parameters(), layer.parameters(), strict=True):
        mine.data.copy_(those_kept(theirs.data, mine.shape))
        for name, value in optimizer.state[theirs].items():
            if isinstance(value, Tensor) and value.ndim:
                other.state[mine][name].copy_(those_kept(value, mine.shape))
    keep_groups_(layer, torch.tensor(KEPT), [optimizer])
    train(layer, optimizer, seed=20, steps=5)
    train(small, other, seed=20, steps=5)
    for name, tensor in groups_first(layer).items():
        torch.testing.assert_close(tensor[:3], groups_first(small)[name], msg=name)
    torch.testing.assert_close(layer.bias, small.bias)


def test_dropped_groups_stay_exactly_zero_in_further_steps(kind: str) -> None:
    layer = filled()
    optimizer = OPTIMIZERS[kind](list(layer.parameters()))
    train(layer, optimizer)
    keep_groups_(layer, torch.tensor(KEPT), [optimizer])
    before = cloned(groups_first(layer))
    train(layer, optimizer, seed=20, steps=5)
    for name, tensor in groups_first(layer).items():
        assert torch.count_nonzero(tensor[3:]) == 0, name
        assert torch.count_nonzero(tensor[:3] - before[name][:3]) == tensor[:3].numel(), name
    for key, tensor in remembered(layer, optimizer).items():
        assert torch.count_nonzero(tensor[3:]) == 0, key


def test_without_their_memory_zeroed_dropped_groups_would_move_again() -> None:
    layer = filled()
    optimizer = AdamW(layer.parameters(), lr=0.05)
    train(layer, optimizer)
    keep_groups_(layer, torch.tensor(KEPT))  # the optimizer is not told
    train(layer, optimizer, steps=1)
    assert torch.count_nonzero(layer.sigma[3:]) == 2


def test_dropping_twice_counts_among_the_groups_that_are_left(kind: str) -> None:
    once, twice = filled(), filled()
    first, second = (OPTIMIZERS[kind](list(layer.parameters())) for layer in (once, twice))
    train(once, first)
    train(twice, second)
    keep_groups_(once, torch.tensor([0, 3]), [first])
    keep_groups_(twice, torch.tensor([0, 2, 3]), [second])
    keep_groups_(twice, torch.tensor([0, 2]), [second])
    assert once.rank == twice.rank == 2
    for name, tensor in groups_first(once).items():
        assert torch.equal(tensor, groups_first(twice)[name]), name
    for key, tensor in remembered(once, first).items():
        assert torch.equal(tensor, remembered(twice, second)[key]), key


def test_keeping_all_changes_nothing() -> None:
    layer = filled()
    optimizer = AdamW(layer.parameters())
    train(layer, optimizer)
    values, memories = cloned(groups_first(layer)), cloned(remembered(layer, optimizer))
    keep_groups_(layer, torch.arange(5), [optimizer])
    assert layer.rank == 5
    assert all(torch.equal(tensor, values[name]) for name, tensor in groups_first(layer).items())
    assert all(torch.equal(tensor, memories[key]) for key, tensor in remembered(layer, optimizer).items())


@pytest.mark.parametrize("as_given", [list, tuple, iter])
def test_several_optimizers_share_a_layer(as_given: Callable[[list[Optimizer]], Any]) -> None:
    layer = filled()
    adam, sgd = AdamW([layer.left]), SGD([layer.sigma, layer.right], lr=0.01, momentum=0.9)
    train(layer, adam, sgd)
    before = [cloned(remembered(layer, optimizer)) for optimizer in (adam, sgd)]
    assert [len(memory) for memory in before] == [2, 2]
    keep_groups_(layer, torch.tensor(KEPT), as_given([adam, sgd]))
    for optimizer, memory in zip((adam, sgd), before, strict=True):
        for key, tensor in remembered(layer, optimizer).items():
            assert torch.equal(tensor[:3], memory[key][KEPT]), key
            assert torch.count_nonzero(tensor[3:]) == 0, key


def test_an_optimizer_that_has_not_stepped_remembers_nothing_afterwards() -> None:
    layer = filled()
    optimizer = AdamW(layer.parameters())
    keep_groups_(layer, torch.tensor(KEPT), [optimizer])
    assert len(optimizer.state) == 0
    train(layer, optimizer)
    assert torch.count_nonzero(layer.left[:, 3:]) == 0


class Odd(SGD):
    """An optimizer by another name."""


def test_memory_of_another_shape_is_refused_and_changes_nothing() -> None:
    layer = filled()
    odd, adam = Odd([layer.right]), AdamW([layer.left, layer.sigma])
    train(layer, adam, odd)
    odd.state[layer.right]["per_output"] = torch.ones(5)
    values, memories = cloned(groups_first(layer)), cloned(remembered(layer, adam))
    with pytest.raises(OptimizerStateError, match=r"Odd keeps 'per_output' of shape \[5\].*AdamW"):
        keep_groups_(layer, torch.tensor(KEPT), [adam, odd])
    assert (layer.rank, int(layer.active)) == (5, 5)
    assert all(torch.equal(tensor, values[name]) for name, tensor in groups_first(layer).items())
    assert all(torch.equal(tensor, memories[key]) for key, tensor in remembered(layer, adam).items())


def test_adafactor_is_refused() -> None:
    layer = filled()
    optimizer = Adafactor(layer.parameters())
    train(layer, optimizer)
    with pytest.raises(OptimizerStateError, match=r"Adafactor keeps 'row_var' of shape \[5, 1\]"):
        keep_groups_(layer, torch.tensor(KEPT), [optimizer])


def test_keeping_no_group_is_refused_and_changes_nothing() -> None:
    layer = filled()
    before = cloned(groups_first(layer))
    with pytest.raises(RankError, match="rank 0 is impossible"):
        keep_groups_(layer, torch.tensor([], dtype=torch.long))
    assert layer.rank == 5
    assert all(torch.equal(tensor, before[name]) for name, tensor in groups_first(layer).items())


def test_a_single_group_and_the_step_count_are_told_apart() -> None:
    layer = filled(1)
    optimizer = AdamW(layer.parameters())
    train(layer, optimizer)
    before = cloned(remembered(layer, optimizer))
    keep_groups_(layer, torch.tensor([0]), [optimizer])
    assert float(optimizer.state[layer.sigma]["step"]) == 3
    assert all(torch.equal(tensor, before[key]) for key, tensor in remembered(layer, optimizer).items())


def test_layers_in_groups_are_found_by_name() -> None:
    shared = SVDLinear(4, 4, 2)
    inner = nn.ModuleDict({"up": shared, "again": shared, "plain": nn.Linear(4, 4), "thin": LowRankLinear(4, 4, 2)})
    found = svd_layers(nn.Sequential(inner, SVDLinear(4, 3, 1)))
    assert list(found) == ["0.up", "1"]
    assert found["0.up"] is shared


@pytest.mark.parametrize("resumed", [False, True])
def test_state_inside_a_wrapper_moves_too(resumed: bool) -> None:
    """`ZeroRedundancyOptimizer` keeps the state in the optimizer that it wraps; restored, it shows it as well."""
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        plain, sharded = filled(), filled()
        optimizers = (
            AdamW(plain.parameters(), lr=0.05),
            ZeroRedundancyOptimizer(sharded.parameters(), AdamW, lr=0.05),
        )
        for layer, optimizer in zip((plain, sharded), optimizers, strict=True):
            train(layer, optimizer)
            if resumed and isinstance(optimizer, ZeroRedundancyOptimizer):
                optimizer.consolidate_state_dict()
                optimizer.load_state_dict(optimizer.state_dict())
            keep_groups_(layer, torch.tensor(KEPT), [optimizer])
            train(layer, optimizer)
        assert torch.equal(plain.product(), sharded.product())
    finally:
        torch.distributed.destroy_process_group()


class Hidden(Optimizer):
    """Wraps another optimizer where nobody looks, as some libraries' wrappers do."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self._inner = [inner]

    def step(self, closure: Any = None) -> Any:
        return self._inner[0].step(closure)

    def state_dict(self) -> dict[str, Any]:
        return self._inner[0].state_dict()


def test_state_that_is_hidden_is_refused() -> None:
    layer = filled()
    optimizer = Hidden(AdamW(layer.parameters(), lr=0.05))
    train(layer, optimizer)
    before = layer.product()
    with pytest.raises(HiddenOptimizerStateError, match="Hidden has taken steps"):
        keep_groups_(layer, torch.tensor(KEPT), [optimizer])
    assert torch.equal(layer.product(), before)
    assert layer.rank == 5


def test_optimizers_without_any_state_are_fine() -> None:
    layer = filled()
    optimizer = SGD(layer.parameters(), lr=0.01)
    train(layer, optimizer)
    keep_groups_(layer, torch.tensor(KEPT), [optimizer])
    assert layer.rank == 3
