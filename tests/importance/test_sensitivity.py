"""Two layers in sequence, 7 → 5 → 4, of 5 and 4 singular groups, in float64."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.importance import FirstOrder, Groups, GroupSensitivity, Squared, Triplet
from lowrank_pl.nn import SVDLinear
from tests.core.matrices import random_matrix

KINDS: dict[str, Callable[[], GroupSensitivity]] = {
    "first_order": lambda: FirstOrder(0.7),
    "squared": lambda: Squared(0.7),
    "triplet": lambda: Triplet(0.7, 0.6),
}


@pytest.fixture(params=list(KINDS))
def make(request: pytest.FixtureRequest) -> Callable[[], GroupSensitivity]:
    return KINDS[request.param]


def model() -> nn.Sequential:
    root = nn.Sequential(SVDLinear(7, 5, 5, dtype=torch.float64), nn.Tanh(), SVDLinear(5, 4, 4, dtype=torch.float64))
    for seed, parameter in enumerate(root.parameters()):
        parameter.data.copy_(random_matrix(*parameter.shape, seed=seed, dtype=torch.float64))
    return root


def loss(root: nn.Module, step: int = 0) -> Tensor:
    output: Tensor = root(random_matrix(6, 7, seed=100 + step, dtype=torch.float64))
    return output.square().mean()


def groups_of(layer: SVDLinear) -> Groups:
    assert layer.left.grad is not None
    assert layer.sigma.grad is not None
    assert layer.right.grad is not None
    return Groups(
        layer.left.detach(),
        layer.sigma.detach(),
        layer.right.detach(),
        layer.left.grad,
        layer.sigma.grad,
        layer.right.grad,
    )


def observed(root: nn.Module, step: int = 0) -> dict[str, Groups]:
    root.zero_grad()
    loss(root, step).backward()
    return {name: groups_of(layer) for name, layer in root.named_modules() if isinstance(layer, SVDLinear)}


def made_up(step: int, rank: int = 4) -> Groups:
    """m = 3, n = 6; every step with other values and gradients."""
    shapes = [(3, rank), (rank,), (rank, 6)]
    parts = [random_matrix(*s, seed=10 * step + i, dtype=torch.float64) for i, s in enumerate(shapes + shapes)]
    return Groups(*parts)


def scores_after(sensitivity: GroupSensitivity, steps: int) -> Tensor:
    for step in range(steps):
        assert sensitivity.observe({"a": made_up(step)})
    return sensitivity.scores("a")


def same_state(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two states are equal bit for bit."""
    return first["steps"] == second["steps"] and {
        (name, quantity): value.tolist() for name, kept in first["averages"].items() for quantity, value in kept.items()
    } == {
        (name, quantity): value.tolist()
        for name, kept in second["averages"].items()
        for quantity, value in kept.items()
    }


def test_first_order_is_the_same_seen_from_each_of_the_three_parts() -> None:
    found = observed(model())
    sensitivity = FirstOrder()
    assert sensitivity.observe(found)
    for name, groups in found.items():
        scores = sensitivity.scores(name)
        assert float(scores.min()) > 0
        torch.testing.assert_close(scores, (groups.left * groups.left_grad).sum(0).abs())
        torch.testing.assert_close(scores, (groups.right * groups.right_grad).sum(1).abs())


def test_first_order_is_the_slope_of_the_loss_as_a_group_fades() -> None:
    root, step = model(), 1e-5
    sensitivity = FirstOrder()
    sensitivity.observe(observed(root))
    for name in ("0", "2"):
        layer = root.get_submodule(name)
        assert isinstance(layer, SVDLinear)
        for k in range(layer.rank):
            value = float(layer.sigma.data[k])
            losses = []
            for factor in (1 + step, 1 - step):
                layer.sigma.data[k] = value * factor
                losses.append(float(loss(root).detach()))
            layer.sigma.data[k] = value
            slope = abs(losses[0] - losses[1]) / (2 * step)
            assert float(sensitivity.scores(name)[k]) == pytest.approx(slope, rel=1e-6, abs=1e-9)


def test_first_order_is_the_change_of_a_linear_loss_when_a_group_is_removed() -> None:
    layer = SVDLinear(7, 5, 4, dtype=torch.float64)
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data.copy_(random_matrix(*parameter.shape, seed=seed, dtype=torch.float64))
    x, g = random_matrix(6, 7, seed=8, dtype=torch.float64), random_matrix(6, 5, seed=9, dtype=torch.float64)
    before = (layer(x) * g).sum()
    before.backward()
    sensitivity = FirstOrder()
    sensitivity.observe({"a": groups_of(layer)})
    for k in range(4):
        kept = layer.sigma.data.clone()
        layer.sigma.data[k] = 0
        change = (before - (layer(x) * g).sum()).detach().abs()
        layer.sigma.data.copy_(kept)
        torch.testing.assert_close(sensitivity.scores("a")[k], change)


def test_scales_between_the_parts_do_not_matter(make: Callable[[], GroupSensitivity]) -> None:
    plain, scaled = model(), model()
    for seed, name in enumerate(("0", "2")):
        layer = scaled.get_submodule(name)
        assert isinstance(layer, SVDLinear)
        a, b = ((2 * random_matrix(layer.rank, seed=20 + seed + i, dtype=torch.float64)).exp() for i in (0, 5))
        layer.left.data.mul_(a)
        layer.right.data.mul_(b[:, None])
        layer.sigma.data.div_(a * b)
    first, second = make(), make()
    for step in range(3):
        torch.testing.assert_close(loss(plain, step), loss(scaled, step))
        first.observe(observed(plain, step))
        second.observe(observed(scaled, step))
    for name in ("0", "2"):
        torch.testing.assert_close(first.scores(name), second.scores(name))


def test_squared_is_first_order_after_one_step_and_the_root_mean_square_after_more() -> None:
    torch.testing.assert_close(scores_after(Squared(0.7), 1), scores_after(FirstOrder(0.7), 1))
    products = torch.stack([made_up(step).sigma * made_up(step).sigma_grad for step in range(3)])
    weights = torch.tensor([0.3 * 0.49, 0.3 * 0.7, 0.3], dtype=torch.float64)
    weights = weights / weights.sum()
    torch.testing.assert_close(scores_after(Squared(0.7), 3), (weights @ products.square()).sqrt())
    assert bool((scores_after(Squared(0.7), 3) > scores_after(FirstOrder(0.7), 3)).all())


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.85, 0.99])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_the_average_is_weighted_by_age_and_its_weights_sum_to_one(beta: float, steps: int) -> None:
    weights = torch.tensor([beta ** (steps - 1 - step) for step in range(steps)], dtype=torch.float64)
    products = torch.stack([(made_up(step).sigma * made_up(step).sigma_grad).abs() for step in range(steps)])
    torch.testing.assert_close(scores_after(FirstOrder(beta), steps), weights / weights.sum() @ products)


def test_two_steps_by_hand() -> None:
    one = torch.ones(1, 1)
    sensitivity = FirstOrder(0.5)
    for slope in (4.0, -1.0):
        sensitivity.observe({"a": Groups(one, torch.tensor([2.0]), one, one, torch.tensor([slope]), one)})
    # |2 · 4| = 8 and |2 · -1| = 2: (0.25 · 8 + 0.5 · 2) / 0.75.
    assert sensitivity.scores("a").tolist() == [4.0]
    assert sensitivity.steps == 2


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_steady_gradients_have_steady_scores_from_the_first_step_on(steps: int) -> None:
    sensitivity = FirstOrder()
    for _ in range(steps):
        sensitivity.observe({"a": made_up(0)})
    torch.testing.assert_close(sensitivity.scores("a"), (made_up(0).sigma * made_up(0).sigma_grad).abs())


def naive_triplet(steps: int, beta: float, beta_uncertainty: float, rank: int = 4) -> list[float]:
    """Parameter by parameter, group by group, in plain numbers."""

    def one(pairs: list[tuple[float, float]]) -> float:
        average = uncertainty = 0.0
        for value, gradient in pairs:
            sensitivity = abs(value * gradient)
            average = beta * average + (1 - beta) * sensitivity
            uncertainty = beta_uncertainty * uncertainty + (1 - beta_uncertainty) * abs(sensitivity - average)
        return average * uncertainty

    run = [made_up(step, rank) for step in range(steps)]
    scores = []
    for k in range(rank):
        left = [one([(float(g.left[i, k]), float(g.left_grad[i, k])) for g in run]) for i in range(3)]
        right = [one([(float(g.right[k, j]), float(g.right_grad[k, j])) for g in run]) for j in range(6)]
        sigma = one([(float(g.sigma[k]), float(g.sigma_grad[k])) for g in run])
        scores.append(sum(left) / 3 + sigma + sum(right) / 6)
    return scores


@pytest.mark.parametrize(("beta", "beta_uncertainty"), [(0.85, 0.85), (0.5, 0.9), (0.9, 0.0)])
@pytest.mark.parametrize("steps", [2, 3, 6])
def test_triplet_is_what_a_loop_over_parameters_gives(beta: float, beta_uncertainty: float, steps: int) -> None:
    scores = scores_after(Triplet(beta, beta_uncertainty), steps)
    expected = torch.tensor(naive_triplet(steps, beta, beta_uncertainty), dtype=torch.float64)
    torch.testing.assert_close(scores, expected)
    assert float(scores.min()) > 0


def test_triplet_tells_groups_apart_after_one_step() -> None:
    assert float(scores_after(Triplet(), 1).max()) > 1e-6


def test_triplet_by_hand() -> None:
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    sensitivity = Triplet(0.5, 0.5)
    for slope in (2.0, 6.0):
        groups = Groups(one, torch.tensor([1.0]), one, zero, torch.tensor([slope]), zero)
        sensitivity.observe({"a": groups})
    # Ī: 1, then 0.5 · 1 + 0.5 · 6 = 3.5. U: 0.5 · (2 - 1), then 0.5 · 0.5 + 0.5 · (6 - 3.5) = 1.5.
    torch.testing.assert_close(sensitivity.scores("a"), torch.tensor([3.5 * 1.5]))


def test_scores_are_one_per_group_and_not_negative(make: Callable[[], GroupSensitivity]) -> None:
    scores = scores_after(make(), 3)
    assert scores.shape == (4,)
    assert float(scores.min()) >= 0
    assert not scores.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_gradients_in_half_precisions_have_scores(
    make: Callable[[], GroupSensitivity], dtype: torch.dtype
) -> None:
    """Their products and squares are below what float16 can hold."""
    sensitivity, wide = make(), make()
    for step in range(2):
        groups = Groups(*(tensor.to(dtype) for tensor in vars(made_up(step)).values()))
        small = replace(
            groups,
            left_grad=groups.left_grad * 2.0**-14,
            sigma_grad=groups.sigma_grad * 2.0**-14,
            right_grad=groups.right_grad * 2.0**-14,
        )
        sensitivity.observe({"a": small})
        wide.observe({"a": Groups(*(tensor.double() for tensor in vars(small).values()))})
    torch.testing.assert_close(sensitivity.scores("a").double(), wide.scores("a"), rtol=1e-4, atol=0)


def test_layers_do_not_mix(make: Callable[[], GroupSensitivity]) -> None:
    together, alone = make(), make()
    for step in range(3):
        together.observe({"a": made_up(step), "b": made_up(step + 50, rank=2)})
    assert torch.equal(together.scores("a"), scores_after(alone, 3))
    assert together.scores("b").shape == (2,)


@pytest.mark.parametrize("part", ["left_grad", "sigma_grad", "right_grad"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_step_with_a_gradient_that_is_not_finite_leaves_everything_as_it_was(
    make: Callable[[], GroupSensitivity], part: str, bad: float
) -> None:
    sensitivity = make()
    for step in range(2):
        sensitivity.observe({"a": made_up(step), "b": made_up(step + 50)})
    before = sensitivity.state_dict()
    damaged = made_up(7)
    getattr(damaged, part).view(-1)[-1] = bad
    # Also for the layers that are fine, whichever comes first.
    assert sensitivity.observe({"a": made_up(5), "b": damaged}) is False
    assert sensitivity.observe({"a": damaged, "b": made_up(5)}) is False
    assert same_state(sensitivity.state_dict(), before)
    assert sensitivity.steps == 2
    assert sensitivity.observe({"a": made_up(2), "b": made_up(52)}) is True
    assert torch.equal(sensitivity.scores("a"), scores_after(make(), 3))


def test_infinities_of_both_signs_do_not_cancel() -> None:
    damaged = made_up(0)
    damaged.left_grad[0, 0], damaged.left_grad[1, 1] = float("inf"), -float("inf")
    sensitivity = FirstOrder()
    assert sensitivity.observe({"a": damaged}) is False
    assert sensitivity.steps == 0
    assert same_state(sensitivity.state_dict(), FirstOrder().state_dict())


def test_gradients_of_zero_are_a_step_like_any_other() -> None:
    nothing = replace(made_up(1), **{f"{p}_grad": torch.zeros_like(getattr(made_up(1), p)) for p in PARTS})
    sensitivity = FirstOrder(0.5)
    assert sensitivity.observe({"a": made_up(0)})
    first = sensitivity.scores("a")
    assert sensitivity.observe({"a": nothing}) is True
    torch.testing.assert_close(sensitivity.scores("a"), first / 3)  # 0.25 / 0.75


PARTS = ("left", "sigma", "right")


def only(groups: Groups, kept: list[int]) -> Groups:
    """Some of the groups."""
    return Groups(
        groups.left[:, kept],
        groups.sigma[kept],
        groups.right[kept],
        groups.left_grad[:, kept],
        groups.sigma_grad[kept],
        groups.right_grad[kept],
    )


def test_keeping_some_groups_is_as_if_the_others_had_never_been(make: Callable[[], GroupSensitivity]) -> None:
    kept, sensitivity, reference = [1, 3], make(), make()
    for step in range(3):
        sensitivity.observe({"a": made_up(step), "b": made_up(step + 50)})
        reference.observe({"a": only(made_up(step), kept), "b": made_up(step + 50)})
    sensitivity.keep("a", torch.tensor(kept))
    for step in range(3, 6):
        torch.testing.assert_close(sensitivity.scores("a"), reference.scores("a"))
        for each in (sensitivity, reference):
            each.observe({"a": only(made_up(step), kept), "b": made_up(step + 50)})
    torch.testing.assert_close(sensitivity.scores("a"), reference.scores("a"))
    assert torch.equal(sensitivity.scores("b"), reference.scores("b"))


def test_a_restored_state_goes_on_as_if_nothing_had_happened(make: Callable[[], GroupSensitivity]) -> None:
    whole, stopped, resumed = make(), make(), make()
    for step in range(3):
        whole.observe({"a": made_up(step)})
        stopped.observe({"a": made_up(step)})
    file = io.BytesIO()
    torch.save(stopped.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.steps == 3
    assert torch.equal(resumed.scores("a"), stopped.scores("a"))
    for step in range(3, 6):
        for sensitivity in (whole, resumed):
            sensitivity.observe({"a": made_up(step)})
        assert torch.equal(resumed.scores("a"), whole.scores("a"))
    resumed.keep("a", torch.tensor([0, 2]))
    assert torch.equal(resumed.scores("a"), whole.scores("a")[[0, 2]])


def test_a_state_does_not_change_with_later_steps(make: Callable[[], GroupSensitivity]) -> None:
    sensitivity, other = make(), make()
    scores_after(sensitivity, 2)
    state = sensitivity.state_dict()
    before = {name: value.clone() for name, value in state["averages"]["a"].items()}
    other.load_state_dict(state)
    for each in (sensitivity, other):
        each.observe({"a": made_up(9)})
        each.keep("a", torch.tensor([0]))
    assert (state["steps"], set(state["averages"])) == (2, {"a"})
    assert all(torch.equal(value, before[name]) for name, value in state["averages"]["a"].items())


def test_the_gradients_are_read_and_not_kept() -> None:
    groups = made_up(0)
    sensitivity = FirstOrder()
    sensitivity.observe({"a": groups})
    before = sensitivity.scores("a").clone()
    groups.sigma_grad.zero_()  # what `zero_grad(set_to_none=False)` does
    assert torch.equal(sensitivity.scores("a"), before)


@pytest.mark.parametrize("beta", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
def test_a_weight_of_the_past_out_of_range_is_refused(beta: float) -> None:
    for kind in (FirstOrder, Squared, Triplet):
        with pytest.raises(RangeError, match=r"beta=.* is out of range: allowed is 0 <= beta < 1"):
            kind(beta)
    with pytest.raises(RangeError, match=r"beta_uncertainty=.* is out of range"):
        Triplet(beta_uncertainty=beta)
