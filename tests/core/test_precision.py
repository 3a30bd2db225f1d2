"""On a pretended Apple GPU (`tests/support/without_float64.py`), not on a real one."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from lowrank_pl.core import axis_weighted_svd, relative_error, singular_values, truncated_svd
from lowrank_pl.core.diagnosis import diagnose
from lowrank_pl.core.elementwise import shrink_importance, weighted_low_rank
from lowrank_pl.core.factors import Factors
from lowrank_pl.core.precision import double, float64_device
from tests.core.matrices import random_importance, random_matrix
from tests.support.without_float64 import MPS, PretendedMps

M, N, R = 9, 7, 3


@pytest.fixture
def mps() -> Iterator[torch.device]:
    with PretendedMps():
        yield MPS


def importance(*shape: int) -> Tensor:
    return random_importance(M * N)[: torch.Size(shape).numel()].view(shape)


def test_only_a_device_without_float64_is_left() -> None:
    assert float64_device(torch.device("mps", 0)) == torch.device("cpu")
    for device in (torch.device("cpu"), torch.device("cuda", 1), torch.device("xpu")):
        assert float64_device(device) == device


def test_the_pretended_device_refuses_what_a_real_one_refuses(mps: torch.device) -> None:
    there = random_matrix(M, N).to(mps)
    assert there.device.type == "mps"
    with pytest.raises(TypeError, match="float64"):
        there.double()
    with pytest.raises(RuntimeError, match="same device"):
        there + random_matrix(M, N)
    assert torch.equal((there + there).cpu(), 2 * random_matrix(M, N))
    assert double(there).device.type == "cpu"


FACTORISE: dict[str, Callable[[Tensor, Callable[[Tensor], Tensor]], Factors]] = {
    "svd": lambda w, _: truncated_svd(w, R),
    "full svd": lambda w, _: truncated_svd(w, N),
    "input": lambda w, put: axis_weighted_svd(w, R, put(importance(N))),
    "output": lambda w, put: axis_weighted_svd(w, R, None, put(importance(M))),
    "both": lambda w, put: axis_weighted_svd(w, R, put(importance(N)), put(importance(M))),
    "element": lambda w, put: weighted_low_rank(w, put(importance(M, N)), R).factors,
    "shrunk": lambda w, put: weighted_low_rank(w, shrink_importance(put(importance(M, N)), 0.5), R).factors,
}


@pytest.mark.parametrize("factorise", FACTORISE.values(), ids=FACTORISE)
def test_factors_are_those_of_the_cpu_and_come_back_to_the_device(
    factorise: Callable[[Tensor, Callable[[Tensor], Tensor]], Factors], mps: torch.device
) -> None:
    weight = random_matrix(M, N)
    expected = factorise(weight, lambda tensor: tensor)
    given = factorise(weight.to(mps), lambda tensor: tensor.to(mps))
    for ours, theirs in ((given.left, expected.left), (given.sigma, expected.sigma), (given.right, expected.right)):
        assert ours.device.type == "mps"
        assert torch.equal(ours.cpu(), theirs)


def test_errors_and_diagnoses_are_those_of_the_cpu(mps: torch.device) -> None:
    weight, other, f = random_matrix(M, N), random_matrix(M, N, seed=1), importance(M, N)
    there = (weight.to(mps), other.to(mps))
    assert relative_error(*there, f.sum(0).to(mps)) == relative_error(weight, other, f.sum(0))
    assert torch.equal(singular_values(there[0]), singular_values(weight))
    assert diagnose(there[0], f.to(mps), R) == diagnose(weight, f, R)
