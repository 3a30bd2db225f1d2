"""What every solver owes: identities, monotony, refusals, and never a result worse than its start."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from lowrank_pl.core import axis_weighted_svd, truncated_svd, weighted_low_rank
from lowrank_pl.core.elementwise import (
    ALS,
    EM,
    SGD,
    Adam,
    AdamSGD,
    ElementwiseSolver,
    PreconditionedLBFGS,
    WeightedProblem,
    best_closed_form,
    shrink_importance,
)
from lowrank_pl.core.elementwise.line import best_step
from lowrank_pl.core.elementwise.solver import Iterate
from lowrank_pl.errors.numerics import ImportanceError, NonFiniteError, RangeError, RankError, ShapeError

SOLVERS: dict[str, Callable[[], ElementwiseSolver]] = {
    "lbfgs": PreconditionedLBFGS,
    "als": lambda: ALS(5),
    "em": lambda: EM(10),
    "sgd": lambda: SGD(50),
    "adam": lambda: Adam(50),
    "adam_sgd_swats": lambda: AdamSGD(100),
    "adam_sgd_fraction": lambda: AdamSGD(100, switch="fraction"),
}
MONOTONE = ("lbfgs", "als", "em")


@pytest.fixture(params=list(SOLVERS.values()), ids=list(SOLVERS))
def solver(request: pytest.FixtureRequest) -> ElementwiseSolver:
    made: ElementwiseSolver = request.param()
    return made


def matrices(
    m: int = 24, n: int = 18, dtype: torch.dtype = torch.float64, spread: float = 1.5
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(m, n, generator=generator, dtype=torch.float64)
    importance = (spread * torch.randn(m, n, generator=generator, dtype=torch.float64)).exp()
    return weight.to(dtype), importance.to(dtype)


def objective(weight: Tensor, importance: Tensor, product: Tensor) -> float:
    return float((importance.double() * (weight.double() - product.double()).square()).sum())


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
def test_full_rank_gives_the_weight_back(solver: ElementwiseSolver, shape: tuple[int, int]) -> None:
    weight, importance = matrices(*shape)
    result = weighted_low_rank(weight, importance, min(shape), solver)
    torch.testing.assert_close(result.factors.product(), weight, atol=1e-9, rtol=0)
    assert result.converged


def test_constant_importance_gives_svd(solver: ElementwiseSolver) -> None:
    weight, _ = matrices()
    result = weighted_low_rank(weight, torch.full_like(weight, 3.7), 5, solver)
    torch.testing.assert_close(result.factors.product(), truncated_svd(weight, 5).product(), atol=1e-6, rtol=0)


def test_rank_one_importance_gives_the_closed_form(solver: ElementwiseSolver) -> None:
    weight, importance = matrices()
    rows, columns = importance[:, 0], importance[0]
    for a, b in ((rows, torch.ones_like(columns)), (torch.ones_like(rows), columns), (rows, columns)):
        closed = axis_weighted_svd(weight, 5, b, a, damping=0.0)
        result = weighted_low_rank(weight, torch.outer(a, b), 5, solver)
        torch.testing.assert_close(result.factors.product(), closed.product(), atol=1e-4, rtol=0)


def test_scaling_the_importance_changes_nothing(solver: ElementwiseSolver) -> None:
    weight, importance = matrices()
    plain = weighted_low_rank(weight, importance, 5, solver)
    for scale in (1e-30, 1e20):
        scaled = weighted_low_rank(weight, importance * scale, 5, solver)
        torch.testing.assert_close(scaled.factors.product(), plain.factors.product(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", MONOTONE)
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_monotone_solvers_never_go_up(name: str, rank: int) -> None:
    weight, importance = matrices()
    start = truncated_svd(weight, rank)
    losses = SOLVERS[name]().solve(weight, importance, start).losses
    assert len(losses) > 2
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(losses))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.5, 3.0])
@pytest.mark.parametrize("rank", [1, 6, 18])
def test_never_worse_than_any_closed_form(
    solver: ElementwiseSolver, dtype: torch.dtype, spread: float, rank: int
) -> None:
    weight, importance = matrices(dtype=dtype, spread=spread)
    result = weighted_low_rank(weight, importance, rank, solver)
    assert result.factors.left.dtype == dtype
    found = objective(weight, importance, result.factors.to(torch.float64).product())
    inputs, outputs = importance.double().sum(0), importance.double().sum(1)
    rivals = [
        axis_weighted_svd(weight.double(), rank, b, a) for a, b in ((None, inputs), (outputs, None), (outputs, inputs))
    ]
    rivals.append(truncated_svd(weight.double(), rank))
    slack = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    total = objective(weight, importance, torch.zeros_like(weight))
    assert found <= min(objective(weight, importance, r.product()) for r in rivals) * (1 + slack) + slack * 1e-3 * total


def test_reported_loss_is_that_of_the_factors(solver: ElementwiseSolver) -> None:
    weight, importance = matrices()
    result = weighted_low_rank(weight, importance, 5, solver)
    share = objective(weight, importance, result.factors.product()) / objective(weight, importance, 0 * weight)
    assert result.loss == pytest.approx(share, rel=1e-9)
    assert result.losses[0] >= result.loss


def test_zero_rows_and_columns_and_a_huge_range(solver: ElementwiseSolver) -> None:
    weight, importance = matrices(dtype=torch.float32)
    importance[3] = 0
    importance[:, 5] = 0
    importance[7, 7] = 1e6
    importance[8, 8] = 1e-6
    result = weighted_low_rank(weight, importance, 4, solver)
    assert torch.isfinite(result.factors.product()).all()
    assert math.isfinite(result.loss)
    assert result.loss <= result.losses[0]


def test_all_zero_importance_gives_svd(solver: ElementwiseSolver) -> None:
    weight, _ = matrices()
    result = weighted_low_rank(weight, torch.zeros_like(weight), 5, solver)
    torch.testing.assert_close(result.factors.product(), truncated_svd(weight, 5).product(), atol=1e-6, rtol=0)


def test_the_same_every_time(solver: ElementwiseSolver) -> None:
    weight, importance = matrices()
    first, second = (weighted_low_rank(weight, importance, 5, solver) for _ in range(2))
    assert torch.equal(first.factors.product(), second.factors.product())
    assert first.losses == second.losses


def test_zero_weight(solver: ElementwiseSolver) -> None:
    _, importance = matrices()
    result = weighted_low_rank(torch.zeros_like(importance), importance, 3, solver)
    assert not result.factors.product().any()


def test_all_solvers_agree_on_the_optimum() -> None:
    weight, importance = matrices(spread=0.7)
    long = [PreconditionedLBFGS(500, 1e-12), ALS(500, 1e-12), Adam(3000), AdamSGD(6000, tolerance=1e-12)]
    losses = [weighted_low_rank(weight, importance, 3, solver).loss for solver in long]
    assert max(losses) <= min(losses) * (1 + 2e-3)


def test_lbfgs_beats_as_many_gradient_steps() -> None:
    weight, importance = matrices(64, 48)
    start = best_closed_form(weight, importance, 8)
    quasi_newton = PreconditionedLBFGS(15, tolerance=0).solve(weight, importance, start).loss
    assert quasi_newton < Adam(15).solve(weight, importance, start).loss
    assert quasi_newton < SGD(15).solve(weight, importance, start).loss


def test_gradients_against_autograd() -> None:
    weight, importance = matrices()
    problem = WeightedProblem.of(weight, importance)
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(24, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, 18, generator=generator, dtype=torch.float64, requires_grad=True)
    loss = (importance * (weight - a @ b).square()).sum() / (importance * weight.square()).sum()
    expected = torch.autograd.grad(loss, [a, b])
    with torch.no_grad():
        found = problem.gradients(a, b, problem.residual(a, b))
        assert problem.loss(a, b) == pytest.approx(float(loss), rel=1e-12)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_an_als_half_step_is_the_least_squares_solution() -> None:
    weight, importance = matrices()
    start = truncated_svd(weight, 4)
    a, b = next(iter(ALS().iterate(WeightedProblem.of(weight, importance), *start.balanced())))[:2]
    for column in (0, 9, 17):
        scale = importance[:, column].sqrt()
        expected = torch.linalg.lstsq(a * scale[:, None], (scale * weight[:, column])[:, None]).solution[:, 0]
        torch.testing.assert_close(b[:, column], expected, atol=1e-6, rtol=1e-6)


def test_em_step_is_the_svd_of_the_completed_matrix() -> None:
    weight, importance = matrices()
    start = truncated_svd(weight, 4)
    a, b, _ = next(iter(EM().iterate(WeightedProblem.of(weight, importance), *start.balanced())))
    p = importance / importance.max()
    filled = p * weight + (1 - p) * start.product()
    torch.testing.assert_close(a @ b, truncated_svd(filled, 4).product())


@pytest.mark.parametrize(
    ("coefficients", "step"),
    [([1.0, -2.0, 1.0, 0.0, 0.0], 1.0), ([0.0, 1.0, 0.0, 0.0, 1.0], 0.0), ([0.0, 0.0, -2.0, 0.0, 1.0], 1.0)],
)
def test_best_step_of_a_quartic(coefficients: list[float], step: float) -> None:
    assert best_step(coefficients) == pytest.approx(step)


def test_swats_switches_and_the_control_does_at_its_fraction() -> None:
    weight, importance = matrices()
    start = best_closed_form(weight, importance, 4)
    early = AdamSGD(40, switch="fraction", fraction=0.1, tolerance=0).solve(weight, importance, start).losses
    late = AdamSGD(40, switch="fraction", fraction=0.9, tolerance=0).solve(weight, importance, start).losses
    assert early[:5] == late[:5]
    assert early[6] != late[6]


class Exploding(ElementwiseSolver):
    """One good step, then nonsense."""

    def __init__(self) -> None:
        super().__init__(10, 0.0)

    def iterate(self, problem: WeightedProblem, a: Tensor, b: Tensor) -> Iterator[Iterate]:
        good = next(iter(ALS().iterate(problem, a, b)))
        yield good
        yield a * math.inf, b, math.inf


def test_divergence_keeps_the_best_and_warns() -> None:
    weight, importance = matrices()
    start = truncated_svd(weight, 4)
    with pytest.warns(UserWarning, match="Exploding diverged at step 2; keeping the best"):
        result = Exploding().solve(weight, importance, start)
    assert not result.converged
    assert result.reason == "diverged at step 2"
    found = objective(weight, importance, result.factors.product())
    assert found < objective(weight, importance, start.product())


def test_shrinkage_keeps_sums_and_ends_at_rank_one() -> None:
    _, importance = matrices()
    for share in (0.0, 0.3, 1.0):
        shrunk = shrink_importance(importance, share)
        torch.testing.assert_close(shrunk.sum(0), importance.sum(0))
        torch.testing.assert_close(shrunk.sum(1), importance.sum(1))
    assert torch.linalg.matrix_rank(shrink_importance(importance, 1.0)) == 1
    assert shrink_importance(importance, 0.0) is importance


def test_bad_input_is_refused() -> None:
    weight, importance = matrices()
    negative, not_a_number, infinite = importance.clone(), importance.clone(), weight.clone()
    negative[2, 3], not_a_number[0, 0], infinite[0, 0] = -1, math.nan, math.inf
    with pytest.raises(ImportanceError, match=r"-1\.0 at \(2, 3\)"):
        weighted_low_rank(weight, negative, 4)
    with pytest.raises(NonFiniteError, match="importance"):
        weighted_low_rank(weight, not_a_number, 4)
    with pytest.raises(NonFiniteError, match="weight"):
        weighted_low_rank(infinite, importance, 4)
    with pytest.raises(ShapeError, match="importance"):
        weighted_low_rank(weight, importance.mT, 4)
    for rank in (0, 19):
        with pytest.raises(RankError, match="= 18"):
            weighted_low_rank(weight, importance, rank)
    with pytest.raises(ShapeError, match="the start's product"):
        ALS().solve(weight, importance, truncated_svd(weight.mT, 4))


@pytest.mark.parametrize(
    "make",
    [
        lambda: ALS(max_steps=0),
        lambda: EM(tolerance=-1.0),
        lambda: Adam(learning_rate=0.0),
        lambda: AdamSGD(fraction=1.0),
        lambda: AdamSGD(switch="swat"),  # type: ignore[arg-type]
        lambda: SGD(momentum=1.0),
        lambda: PreconditionedLBFGS(tolerance=math.nan),
    ],
)
def test_bad_settings_are_refused(make: Callable[[], ElementwiseSolver]) -> None:
    with pytest.raises(RangeError):
        make()
