"""b = 4 samples, m = 6 outputs, n = 8 inputs, t tokens."""

import pytest
import torch
from torch import Tensor

from lowrank_pl.importance import squares
from lowrank_pl.importance.squares import AxisSquares, FullSquares, Scratch
from tests.core.matrices import random_matrix

B, M, N = 4, 6, 8
CPU = torch.device("cpu")
SHORT, LONG = 1, 20  # 2 t (m + n) is 28 and 560, m n is 48


def tokens(t: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return random_matrix(B, t, N, dtype=dtype), random_matrix(B, t, M, seed=1, dtype=dtype)


def naive(x: Tensor, g: Tensor) -> Tensor:
    total = torch.zeros(M, N, dtype=torch.float64)
    for d in range(B):
        gradient = sum(torch.outer(g[d, t].double(), x[d, t].double()) for t in range(x.shape[1]))
        assert isinstance(gradient, Tensor)
        total += gradient**2
    return total


@pytest.mark.parametrize("t", [SHORT, LONG])
def test_full_squares_are_squares_of_per_sample_gradients(t: int) -> None:
    full = FullSquares(M, N, CPU, Scratch())
    full.add(*tokens(t))
    (total,) = full.tensors()
    torch.testing.assert_close(total.double(), naive(*tokens(t)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("t", [SHORT, LONG])
def test_axis_squares_are_the_sums_of_full_squares(t: int) -> None:
    axis = AxisSquares(M, N, CPU, Scratch())
    axis.add(*tokens(t))
    expected = naive(*tokens(t))
    input_sums, output_sums = axis.tensors()
    torch.testing.assert_close(input_sums.double(), expected.sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output_sums.double(), expected.sum(1), rtol=1e-5, atol=1e-5)


def test_long_samples_take_the_direct_way_and_short_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    direct: list[int] = []
    original = AxisSquares._add_products

    def spy(self: AxisSquares, x: Tensor, g: Tensor) -> None:
        direct.append(x.shape[1])
        original(self, x, g)

    monkeypatch.setattr(AxisSquares, "_add_products", spy)
    axis = AxisSquares(M, N, CPU, Scratch())
    axis.add(*tokens(SHORT))
    axis.add(*tokens(LONG))
    assert direct == [LONG]


def test_both_ways_of_the_sums_agree() -> None:
    # At the same tokens: once by Gram products, once by the method for long samples.
    gram, direct = (AxisSquares(M, N, CPU, Scratch()) for _ in range(2))
    gram.add(*tokens(SHORT))
    direct._add_products(*tokens(SHORT))
    for one, other in zip(gram.tensors(), direct.tensors(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("samples_per_chunk", [1, 3, 100])
def test_chunked_products_of_an_accelerator_agree(monkeypatch: pytest.MonkeyPatch, samples_per_chunk: int) -> None:
    monkeypatch.setattr(squares, "CHUNK_BYTES", samples_per_chunk * M * N * 4)
    sizes: list[int] = []
    bmm = torch.bmm

    def counted(a: Tensor, b: Tensor) -> Tensor:
        sizes.append(len(a))
        return bmm(a, b)

    monkeypatch.setattr(torch, "bmm", counted)
    chunked = FullSquares(M, N, CPU, Scratch())
    chunked._buffer = None
    chunked.add(*tokens(LONG))
    torch.testing.assert_close(chunked.total.double(), naive(*tokens(LONG)), rtol=1e-5, atol=1e-5)
    assert sizes == {1: [1, 1, 1, 1], 3: [3, 1], 100: [4]}[samples_per_chunk]


def test_a_chunk_smaller_than_one_gradient_still_holds_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(squares, "CHUNK_BYTES", 1)
    chunked = FullSquares(M, N, CPU, Scratch())
    chunked._buffer = None
    chunked.add(*tokens(SHORT))
    torch.testing.assert_close(chunked.total.double(), naive(*tokens(SHORT)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [FullSquares, AxisSquares])
@pytest.mark.parametrize("t", [SHORT, LONG])
def test_adding_accumulates_and_leaves_the_tensors_given_alone(
    make: type[FullSquares] | type[AxisSquares], t: int
) -> None:
    x, g = tokens(t)
    once, twice = make(M, N, CPU, Scratch()), make(M, N, CPU, Scratch())
    once.add(x, g)
    twice.add(x, g)
    twice.add(x, g)
    for single, double in zip(once.tensors(), twice.tensors(), strict=True):
        torch.testing.assert_close(double, 2 * single)
    assert torch.equal(x, tokens(t)[0])
    assert torch.equal(g, tokens(t)[1])


@pytest.mark.parametrize("make", [FullSquares, AxisSquares])
@pytest.mark.parametrize("t", [SHORT, LONG])
def test_half_precision_is_accumulated_in_float32(make: type[FullSquares] | type[AxisSquares], t: int) -> None:
    accumulator = make(M, N, CPU, Scratch())
    x, g = tokens(t, torch.bfloat16)
    accumulator.add(x, g)
    expected = naive(x, g)
    first = accumulator.tensors()[0]
    assert first.dtype is torch.float32
    torch.testing.assert_close(
        first.double(), expected if make is FullSquares else expected.sum(0), rtol=1e-5, atol=1e-5
    )


def test_layers_of_one_shape_share_a_buffer_and_not_their_sums() -> None:
    scratch = Scratch()
    one, other = FullSquares(M, N, CPU, scratch), FullSquares(M, N, CPU, scratch)
    assert scratch.get(M, N) is scratch.get(M, N)
    assert scratch.get(M, N).shape == (M, N)
    assert scratch.get(N, M).shape == (N, M)
    x, g = tokens(SHORT)
    one.add(x, g)
    other.add(2 * x, g)
    torch.testing.assert_close(other.total, 4 * one.total)
