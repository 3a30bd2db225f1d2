"""Against the full SVD, also where squared condition numbers would lose everything."""

import pytest
import torch
from torch import Tensor

from lowrank_pl.core import axis_weighted_svd, truncated_svd
from lowrank_pl.core.subspace import TAIL, left_singular_vectors
from tests.core.matrices import random_importance, random_matrix

SHAPES = [(24, 40), (40, 24), (32, 32)]
RANKS = [1, 7, 20, 23, 24]


def with_spectrum(shape: tuple[int, int], sigma: Tensor) -> Tensor:
    k = min(shape)
    u = torch.linalg.qr(random_matrix(shape[0], k, dtype=torch.float64)).Q
    v = torch.linalg.qr(random_matrix(shape[1], k, seed=1, dtype=torch.float64)).Q
    made: Tensor = (u * sigma) @ v.mT
    return made


def spectra(k: int) -> dict[str, Tensor]:
    powers = torch.arange(k, dtype=torch.float64)
    return {
        "flat": torch.ones(k, dtype=torch.float64),
        "like a weight": 1 / (1 + powers),
        "condition 1e12": torch.logspace(0, -12, k, dtype=torch.float64),
        "just above the tail": torch.where(powers < 7, 1.0, 2 * TAIL**0.5 / max(k - 7, 1) ** 0.5).double(),
        "just below the tail": torch.where(powers < 7, 1.0, 0.5 * TAIL**0.5 / max(k - 7, 1) ** 0.5).double(),
        "rank deficient": torch.where(powers < 5, 1 / (1 + powers), 0.0),
        "one and noise": torch.where(powers < 1, 1.0, 1e-9).double(),
        "pairs": 1 / (1 + powers // 2),
        "zero": torch.zeros(k, dtype=torch.float64),
    }


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e-200, 1e150])
@pytest.mark.parametrize("kind", spectra(2))
@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_is_that_of_the_full_svd(shape: tuple[int, int], kind: str, scale: float) -> None:
    matrix = with_spectrum(shape, spectra(min(shape))[kind])
    for rank in RANKS:
        basis = left_singular_vectors(matrix * scale, rank)
        assert basis.shape == (shape[0], rank)
        torch.testing.assert_close(basis.mT @ basis, torch.eye(rank, dtype=torch.float64), atol=1e-12, rtol=0)
        u = torch.linalg.svd(matrix, full_matrices=False)[0][:, :rank]
        given, expected = (float(torch.linalg.norm(matrix - b @ (b.mT @ matrix))) for b in (basis, u))
        # What float64 leaves of a weight of norm 1 is 1e-15.
        assert given <= expected * (1 + 1e-10) + 1e-14


@pytest.mark.parametrize("shape", SHAPES)
def test_an_svd_is_taken_only_where_squares_would_lose_digits(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sigma = spectra(min(shape))
    matrices = {kind: with_spectrum(shape, sigma[kind]) for kind in sigma}
    calls: list[object] = []
    inner = torch.linalg.svd

    def svd(*args: Tensor, **options: bool) -> object:
        calls.append(args)
        return inner(*args, **options)

    monkeypatch.setattr(torch.linalg, "svd", svd)
    taken = {}
    for kind, matrix in matrices.items():
        calls.clear()
        left_singular_vectors(matrix, 7)
        taken[kind] = bool(calls)
    without = {"flat", "like a weight", "just above the tail", "pairs"}
    assert {kind for kind, svd_was in taken.items() if not svd_was} == without


@pytest.mark.parametrize("side", ["none", "input", "output", "both"])
@pytest.mark.parametrize("kind", ["like a weight", "condition 1e12", "rank deficient"])
@pytest.mark.parametrize("shape", SHAPES)
def test_factorisations_are_those_with_the_full_svd(
    shape: tuple[int, int], kind: str, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = with_spectrum(shape, spectra(min(shape))[kind])
    b = random_importance(shape[1], dtype=torch.float64) if side in ("input", "both") else None
    a = random_importance(shape[0], seed=2, dtype=torch.float64) if side in ("output", "both") else None
    given = axis_weighted_svd(weight, 4, b, a)
    for module in ("svd", "axis_weighted"):
        monkeypatch.setattr(
            f"lowrank_pl.core.{module}.left_singular_vectors",
            lambda matrix, rank: torch.linalg.svd(matrix, full_matrices=False)[0][:, :rank],
        )
    expected = axis_weighted_svd(weight, 4, b, a)
    torch.testing.assert_close(given.product(), expected.product(), rtol=0, atol=1e-10 * float(weight.norm()))
    torch.testing.assert_close(given.sigma, expected.sigma, rtol=1e-10, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_truncation_needs_no_full_svd(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    weight, sizes = with_spectrum(shape, spectra(min(shape))["like a weight"]), []
    inner = torch.linalg.svd

    def svd(matrix: Tensor, **options: bool) -> object:
        sizes.append(tuple(matrix.shape))
        return inner(matrix, **options)

    monkeypatch.setattr(torch.linalg, "svd", svd)
    truncated_svd(weight, 5)
    axis_weighted_svd(weight, 5, torch.arange(1.0, shape[1] + 1))
    assert sizes == [(5, 5), (5, 5)]
