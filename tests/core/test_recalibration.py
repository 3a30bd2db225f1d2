import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lowrank_pl.core.recalibration import match_distributions, match_values
from lowrank_pl.errors.numerics import NonFiniteError, ShapeError
from tests.core.matrices import random_matrix


def divergence(outputs: Tensor, reference: Tensor) -> float:
    return float(F.kl_div(outputs.double().log_softmax(1), reference.double().softmax(1), reduction="batchmean"))


@pytest.mark.parametrize("classes", [2, 3, 20])
def test_equal_outputs_are_left_as_they_are(classes: int) -> None:
    logits = random_matrix(500, classes)
    scale, bias = match_distributions(logits, logits)
    torch.testing.assert_close(scale, torch.ones_like(scale), atol=1e-4, rtol=0)
    torch.testing.assert_close(bias, torch.zeros_like(bias), atol=1e-4, rtol=0)


@pytest.mark.parametrize("classes", [2, 3, 20])
def test_a_scale_and_bias_are_undone(classes: int) -> None:
    reference = 2 * random_matrix(2000, classes, dtype=torch.float64)
    change = random_matrix(classes, seed=3, dtype=torch.float64)
    outputs = (reference - change) * 3  # three times too sure of itself
    scale, bias = match_distributions(outputs, reference)
    assert divergence(scale * outputs + bias, reference) < 0.01 * divergence(outputs, reference)
    torch.testing.assert_close(scale, torch.full_like(scale, 1 / 3), rtol=0.1, atol=0)


@pytest.mark.parametrize("seed", range(5))
def test_never_worse_than_doing_nothing(seed: int) -> None:
    outputs, reference = random_matrix(7, 4, seed=seed), random_matrix(7, 4, seed=10 + seed)
    scale, bias = match_distributions(outputs, reference)
    assert divergence(scale * outputs + bias, reference) <= divergence(outputs, reference) + 1e-12


def test_one_sample_and_equal_samples_decide_little_but_break_nothing() -> None:
    for outputs in (random_matrix(1, 3), torch.zeros(5, 3), torch.full((5, 3), 1e4)):
        scale, bias = match_distributions(outputs, random_matrix(len(outputs), 3, seed=1))
        assert bool(torch.isfinite(scale).all())
        assert bool(torch.isfinite(bias).all())


def test_values_in_closed_form() -> None:
    reference = random_matrix(300, 2, dtype=torch.float64)
    outputs = 0.25 * reference - torch.tensor([1.0, 2.0])
    scale, bias = match_values(outputs, reference)
    torch.testing.assert_close(scale, torch.full_like(scale, 4.0))
    torch.testing.assert_close(bias, torch.tensor([4.0, 8.0], dtype=torch.float64))


def test_values_that_do_not_vary_or_go_the_other_way_keep_their_scale() -> None:
    reference = random_matrix(50, 2, dtype=torch.float64)
    outputs = torch.stack([torch.full((50,), 7.0, dtype=torch.float64), -reference[:, 1]], 1)
    scale, bias = match_values(outputs, reference)
    torch.testing.assert_close(scale, torch.ones_like(scale))
    torch.testing.assert_close((scale * outputs + bias).mean(0), reference.mean(0))


def test_it_works_in_inference_mode() -> None:
    with torch.inference_mode():
        outputs, reference = random_matrix(20, 3), random_matrix(20, 3, seed=1)
        scale, _ = match_distributions(outputs, reference)
    assert not scale.is_inference()


def test_bad_input_is_refused() -> None:
    for match in (match_distributions, match_values):
        with pytest.raises(ShapeError):
            match(torch.zeros(3, 2), torch.zeros(3, 3))
        with pytest.raises(ShapeError):
            match(torch.zeros(3), torch.zeros(3))
        with pytest.raises(NonFiniteError):
            match(torch.full((3, 2), math.nan), torch.zeros(3, 2))
