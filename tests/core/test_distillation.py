"""Identities of the distances to a teacher, and numbers by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lowrank_pl.core.distillation import hidden_states_error, softened_divergence


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_a_perfect_student_has_nothing_to_learn(temperature: float) -> None:
    teacher = _random(5, 3)
    student = teacher.clone().requires_grad_()
    loss = softened_divergence(student, teacher, temperature).sum()
    loss.backward()
    assert loss.abs().item() < 1e-14
    assert student.grad is not None
    assert float(student.grad.abs().max()) < 1e-14


def test_only_differences_of_logits_count() -> None:
    student, teacher = _random(5, 3), _random(5, 3, seed=1)
    shifted = softened_divergence(student + 7, teacher - _random(5, 1, seed=2), 3.0)
    torch.testing.assert_close(shifted, softened_divergence(student, teacher, 3.0))


def test_divergence_by_hand() -> None:
    # Two classes, teacher 3:1, student 1:1: 3/4 ln(3/2) + 1/4 ln(1/2); at τ = 2 the odds are √3:1.
    teacher, student = torch.tensor([[math.log(3), 0.0]]), torch.zeros(1, 2)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert softened_divergence(student, teacher, 1.0).item() == pytest.approx(expected, rel=1e-5)
    p = math.sqrt(3) / (1 + math.sqrt(3))
    softened = 4 * (p * math.log(2 * p) + (1 - p) * math.log(2 - 2 * p))
    assert softened_divergence(student, teacher, 2.0).item() == pytest.approx(softened, rel=1e-5)


def test_the_gradient_is_that_of_the_softened_probabilities_and_keeps_its_size() -> None:
    """`∂/∂z_s = τ (p_s − p_t)`, which for a high τ is the difference of centred logits over their number."""
    student, teacher = _random(4, 3).requires_grad_(), _random(4, 3, seed=1)
    for temperature in (1.0, 2.0):
        (grad,) = torch.autograd.grad(softened_divergence(student, teacher, temperature).sum(), student)
        p, q = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
        torch.testing.assert_close(grad, temperature * (p - q))
    (grad,) = torch.autograd.grad(softened_divergence(student, teacher, 1e4).sum(), student)
    centred = (student - student.mean(-1, keepdim=True)) - (teacher - teacher.mean(-1, keepdim=True))
    torch.testing.assert_close(grad, centred / 3, rtol=1e-3, atol=1e-4)


def test_hidden_states_by_hand() -> None:
    # Blocks differ by 1 and by 3, everywhere: (1 + 9) / 2.
    teacher = [torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)]
    student = [torch.ones(2, 3, 4), torch.full((2, 3, 4), 3.0)]
    assert hidden_states_error(student, teacher, None).item() == 5.0
    assert hidden_states_error(student, teacher, torch.tensor([[1, 1, 0], [1, 0, 0]])).item() == 5.0
    assert hidden_states_error(teacher, teacher, None).item() == 0.0


def test_padding_has_no_influence() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    student, teacher = _random(2, 3, 4).requires_grad_(), _random(2, 3, 4, seed=1)
    expected = (student - teacher).square()[mask.bool()].mean()
    spoiled = teacher.masked_fill(mask[..., None] == 0, torch.inf)
    loss = hidden_states_error([student], [spoiled], mask)
    torch.testing.assert_close(loss, expected.float())
    (grad,) = torch.autograd.grad(loss, student)
    assert torch.equal(grad.abs().sum(-1) > 0, mask.bool())
