"""Moments from training steps. n = 5 inputs, m = 4 outputs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lowrank_pl.core import LinearShape
from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.importance import KroneckerSensitivity
from tests.core.matrices import random_matrix

SHAPE, CPU = LinearShape(4, 5), torch.device("cpu")


def rows(size: int, seed: int) -> Tensor:
    return random_matrix(2, 3, size, seed=seed)


def test_sums_are_those_of_all_calls_and_fade_from_step_to_step() -> None:
    sensitivity = KroneckerSensitivity(beta=0.5)
    x, g = [rows(5, seed) for seed in range(3)], [rows(4, seed) for seed in range(3, 6)]
    sensitivity.begin_step()
    sensitivity.add("a", x[0], g[0])
    sensitivity.add("a", x[1], g[1])  # a layer that is called twice, or a second batch of the same step
    sensitivity.begin_step()
    sensitivity.add("a", x[2], g[2])

    def faded(parts: list[Tensor]) -> Tensor:
        grams = [part.reshape(-1, part.shape[-1]) for part in parts]
        return 0.5 * (grams[0].T @ grams[0] + grams[1].T @ grams[1]) + grams[2].T @ grams[2]

    inputs, outputs, tokens = sensitivity.moments("a", SHAPE, CPU)
    torch.testing.assert_close(inputs, faded(x))
    torch.testing.assert_close(outputs, faded(g))
    assert float(tokens) == 0.5 * 12 + 6
    assert sensitivity.steps == 2
    torch.testing.assert_close(sensitivity.mean(inputs, outputs, tokens).inputs, faded(x) / 12)


def test_tokens_without_gradient_count_for_neither() -> None:
    sensitivity = KroneckerSensitivity()
    x, g = rows(5, 0), rows(4, 1)
    g[:, 1:] = 0
    sensitivity.begin_step()
    sensitivity.add("a", x, g)
    inputs, _, tokens = sensitivity.moments("a", SHAPE, CPU)
    torch.testing.assert_close(inputs, x[:, 0].T @ x[:, 0])
    assert float(tokens) == 2


def test_the_mean_over_all_choices_of_few_tokens_is_what_all_of_them_give() -> None:
    x, g = random_matrix(4, 3, 5, seed=0), random_matrix(4, 3, 4, seed=1)
    every, few = KroneckerSensitivity(beta=1.0, max_tokens=None), KroneckerSensitivity(beta=1.0, max_tokens=4)
    chosen = []
    for _ in range(12):  # 4 of 12 tokens at a time
        for sensitivity in (every, few):
            sensitivity.begin_step()
            sensitivity.add("a", x, g, scale=0.5)
        chosen.append(few.moments("a", SHAPE, CPU)[0])
    assert not torch.allclose(chosen[0], chosen[1] - chosen[0])
    for whole, part in zip(every.moments("a", SHAPE, CPU), few.moments("a", SHAPE, CPU), strict=True):
        torch.testing.assert_close(part, whole)


def test_no_token_is_left_out_where_there_are_not_more() -> None:
    every, few = KroneckerSensitivity(max_tokens=None), KroneckerSensitivity(max_tokens=2)
    x, g = rows(5, 0), rows(4, 1)
    g[:, 1:] = 0  # one token of three that a gradient comes back to: two in all
    for sensitivity in (every, few):
        sensitivity.begin_step()
        sensitivity.add("a", x, g)
    pairs = zip(every.moments("a", SHAPE, CPU), few.moments("a", SHAPE, CPU), strict=True)
    assert all(torch.equal(whole, part) for whole, part in pairs)


@pytest.mark.parametrize("length", [1, 4, 64])
def test_tokens_at_every_position_take_turns(length: int) -> None:
    sensitivity = KroneckerSensitivity(beta=1.0, max_tokens=16)
    x = torch.eye(length).repeat(128 // length, 1, 1)  # the input tells its position
    for _ in range(128):
        sensitivity.begin_step()
        sensitivity.add("a", x, torch.ones(*x.shape[:2], 4))
    inputs, _, tokens = sensitivity.moments("a", LinearShape(4, length), CPU)
    torch.testing.assert_close(inputs, torch.eye(length) * 128 * 128 / length)
    assert float(tokens) == 128 * 128


def test_the_diagonal_alone_and_the_scale_of_the_loss() -> None:
    full, diagonal = KroneckerSensitivity(), KroneckerSensitivity(diagonal=True)
    for sensitivity, scale in ((full, 1.0), (diagonal, 1024.0)):
        sensitivity.begin_step()
        sensitivity.add("a", rows(5, 0), rows(4, 1) * scale, scale)
    for whole, part in zip(full.moments("a", SHAPE, CPU)[:2], diagonal.moments("a", SHAPE, CPU)[:2], strict=True):
        torch.testing.assert_close(part, whole.diagonal())
    assert full.bytes(SHAPE) == 4 * (16 + 25)
    assert diagonal.bytes(SHAPE) == 4 * (4 + 5)


def test_small_gradients_in_half_precision_are_not_lost_with_the_scale() -> None:
    """2⁻²⁶ is below what float16 can hold, which is what the scale of the loss is for."""
    whole, half = KroneckerSensitivity(), KroneckerSensitivity()
    g = rows(4, 1) * 2.0**-26
    for sensitivity, x, scaled in (
        (whole, rows(5, 0), g * 65536),
        (half, rows(5, 0).half(), (g * 65536).half()),
    ):
        sensitivity.begin_step()
        sensitivity.add("a", x, scaled, 65536.0)
    expected, found = (sensitivity.moments("a", SHAPE, CPU)[1] for sensitivity in (whole, half))
    assert bool(expected.any())
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0.01 * float(expected.abs().max()))


def test_blocks_are_those_of_the_whole_and_come_back_from_a_checkpoint() -> None:
    shape = LinearShape(4, 6)
    full, blocks = KroneckerSensitivity(), KroneckerSensitivity(block_size=2)
    for sensitivity in (full, blocks):
        sensitivity.begin_step()
        sensitivity.add("a", rows(6, 0), rows(4, 1))
    restored = KroneckerSensitivity(block_size=2)
    restored.load_state_dict(blocks.state_dict())
    for sensitivity in (blocks, restored):
        sums = zip(full.moments("a", shape, CPU)[:2], sensitivity.moments("a", shape, CPU)[:2], strict=True)
        for whole, part in sums:
            kept = torch.block_diag(*[torch.ones(2, 2)] * len(part))
            torch.testing.assert_close(torch.block_diag(*part), kept * whole)
    assert blocks.bytes(shape) == 4 * (4 * 2 + 6 * 2)
    with pytest.raises(RangeError, match=r"sensitivity\.block_size=2 is .* a divisor of 5, the features of 'a'"):
        blocks.check({"a": SHAPE})


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_left_out(bad: float) -> None:
    sensitivity = KroneckerSensitivity()
    sensitivity.begin_step()
    assert sensitivity.add("a", rows(5, 0), rows(4, 1))
    before = [tensor.clone() for tensor in sensitivity.moments("a", SHAPE, CPU)]
    g = rows(4, 2)
    g[0, 0, 0] = bad
    assert not sensitivity.add("a", rows(5, 3), g)
    x = rows(5, 3)
    x[0, 0, 0] = bad
    assert not sensitivity.add("a", x, rows(4, 2))
    assert all(torch.equal(a, b) for a, b in zip(before, sensitivity.moments("a", SHAPE, CPU), strict=True))


def test_a_layer_that_was_never_called_has_moments_of_zero() -> None:
    inputs, outputs, tokens = KroneckerSensitivity().moments("a", SHAPE, CPU)
    assert inputs.shape == (5, 5)
    assert not inputs.any()
    assert not outputs.any()
    assert not tokens.any()


@pytest.mark.parametrize("diagonal", [False, True])
def test_moments_are_copies(diagonal: bool) -> None:
    """Processes add theirs up in place; the sums of one process must not become those of all."""
    sensitivity = KroneckerSensitivity(diagonal=diagonal)
    sensitivity.begin_step()
    sensitivity.add("a", rows(5, 0), rows(4, 1))
    before = [tensor.clone() for tensor in sensitivity.moments("a", SHAPE, CPU)]
    for tensor in sensitivity.moments("a", SHAPE, CPU):
        tensor *= 2
    assert all(torch.equal(a, b) for a, b in zip(before, sensitivity.moments("a", SHAPE, CPU), strict=True))


def test_the_state_goes_through_a_checkpoint_bit_for_bit() -> None:
    first, second = KroneckerSensitivity(beta=0.7), KroneckerSensitivity(beta=0.7)
    first.begin_step()
    first.add("a", rows(5, 0), rows(4, 1))
    second.load_state_dict(first.state_dict())
    for sensitivity in (first, second):
        sensitivity.begin_step()
        sensitivity.add("a", rows(5, 2), rows(4, 3))
    pairs = zip(first.moments("a", SHAPE, CPU), second.moments("a", SHAPE, CPU), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert second.steps == 2
    second.reset()
    assert second.steps == 0
    assert not second.moments("a", SHAPE, CPU)[0].any()


def test_moments_are_where_the_layer_is_also_right_after_a_checkpoint_was_read() -> None:
    sensitivity = KroneckerSensitivity()
    sensitivity.begin_step()
    sensitivity.add("a", rows(5, 0), rows(4, 1))
    sensitivity.load_state_dict(sensitivity.state_dict())
    assert {part.device.type for part in sensitivity.moments("a", SHAPE, torch.device("meta"))} == {"meta"}


@pytest.mark.parametrize(("samples", "length"), [(16, 64), (64, 64), (24, 50)])
def test_few_steps_see_every_part_of_texts_of_one_length(samples: int, length: int) -> None:
    sensitivity = KroneckerSensitivity(beta=1.0, max_tokens=16)
    parts = torch.eye(4)[torch.arange(length) * 4 // length]  # the input tells in which quarter of its text it is
    for _ in range(16):
        sensitivity.begin_step()
        sensitivity.add("a", parts.repeat(samples, 1, 1), torch.ones(samples, length, 4))
    inputs, _, tokens = sensitivity.moments("a", LinearShape(4, 4), CPU)
    torch.testing.assert_close(inputs.diagonal() / tokens, torch.full((4,), 0.25), rtol=0.3, atol=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 0), ("beta", 1.5), ("beta", -0.1), ("beta", math.nan), ("damping", -1.0), ("max_tokens", 0)],
)
def test_impossible_settings_are_refused(name: str, value: float) -> None:
    with pytest.raises(RangeError, match=f"sensitivity.{name}"):
        KroneckerSensitivity(**{name: value})  # type: ignore[arg-type]


def test_options_name_the_class_and_every_setting() -> None:
    told = KroneckerSensitivity(steps=4).options()
    assert told == {
        "class": "KroneckerSensitivity",
        "observed_steps": 4,
        "beta": 0.95,
        "damping": 1e-3,
        "diagonal": False,
        "block_size": None,
        "max_tokens": 512,
    }
