import torch

from lowrank_pl.core import Factors, truncated_svd
from tests.core.matrices import random_matrix


def hand_made() -> Factors:
    return Factors(torch.eye(3)[:, :2], torch.tensor([4.0, 1.0]), torch.eye(5)[:2])


def test_product_of_a_hand_made_pair() -> None:
    expected = torch.zeros(3, 5)
    expected[0, 0], expected[1, 1] = 4.0, 1.0
    assert torch.equal(hand_made().product(), expected)
    assert hand_made().rank == 2


def test_balanced_factors_multiply_to_the_product_and_share_the_scale() -> None:
    factors = truncated_svd(random_matrix(8, 6), 4)
    a, b = factors.balanced()
    assert (a.shape, b.shape) == ((8, 4), (4, 6))
    torch.testing.assert_close(a @ b, factors.product())
    torch.testing.assert_close(torch.linalg.norm(a, dim=0), torch.linalg.norm(b, dim=1))
    torch.testing.assert_close(torch.linalg.norm(a, dim=0) ** 2, factors.sigma)


def test_from_product_keeps_the_product_and_orthonormalises() -> None:
    # Scales of A and B far apart and mixed, as a weighted method leaves them.
    mixing = random_matrix(3, 3, seed=2, dtype=torch.float64)
    a = 1e4 * random_matrix(7, 3, dtype=torch.float64) @ mixing
    b = 1e-4 * torch.linalg.solve(mixing, random_matrix(3, 9, seed=1, dtype=torch.float64))
    factors = Factors.from_product(a, b)
    identity = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(factors.product(), a @ b)
    torch.testing.assert_close(factors.left.mT @ factors.left, identity)
    torch.testing.assert_close(factors.right @ factors.right.mT, identity)
    torch.testing.assert_close(factors.sigma, torch.linalg.svdvals(a @ b)[:3])


def test_from_product_of_a_singular_form_gives_it_back() -> None:
    factors = truncated_svd(random_matrix(8, 6, dtype=torch.float64), 3)
    again = Factors.from_product(*factors.balanced())
    torch.testing.assert_close(again.sigma, factors.sigma)
    # Singular vectors are unique up to sign.
    torch.testing.assert_close((again.left.mT @ factors.left).abs(), torch.eye(3, dtype=torch.float64))


def test_from_product_of_deficient_factors_is_finite() -> None:
    factors = Factors.from_product(torch.ones(4, 2), torch.zeros(2, 3))
    assert torch.equal(factors.product(), torch.zeros(4, 3))
    assert bool(torch.isfinite(factors.left).all())
    assert bool(torch.isfinite(factors.right).all())


def test_to_changes_the_dtype_of_all_parts() -> None:
    half = hand_made().to(torch.bfloat16)
    assert {half.left.dtype, half.sigma.dtype, half.right.dtype} == {torch.bfloat16}
    assert torch.equal(half.product().float(), hand_made().product())
