import pytest
import torch

from lowrank_pl.importance.gram import GramSum
from tests.core.matrices import random_matrix

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [1, 7, 384, 385, 1000])
def test_equals_the_sum_of_outer_products(size: int) -> None:
    gram = GramSum(size, CPU)
    batches = [random_matrix(11, size, seed=seed, dtype=torch.float64) for seed in range(3)]
    for rows in batches:
        gram.add(rows)
    rows = torch.cat(batches)
    torch.testing.assert_close(gram.matrix(), rows.mT @ rows)
    assert torch.equal(gram.matrix(), gram.matrix().mT)
    gram.add(rows)  # what is below the diagonal does not count twice
    torch.testing.assert_close(gram.matrix(), 2 * rows.mT @ rows)


def test_the_diagonal_alone() -> None:
    rows, gram = random_matrix(11, 7, dtype=torch.float64), GramSum(7, CPU, diagonal=True)
    gram.add(rows)
    torch.testing.assert_close(gram.matrix(), (rows.mT @ rows).diagonal())


def test_blocks_along_the_diagonal() -> None:
    rows, gram = random_matrix(11, 6, dtype=torch.float64), GramSum(6, CPU, block_size=3)
    gram.add(rows)
    whole = rows.mT @ rows
    torch.testing.assert_close(gram.matrix(), torch.stack([whole[:3, :3], whole[3:, 3:]]))


def test_the_error_does_not_grow_with_the_number_of_batches() -> None:
    # A large mean and thousands of batches: a sum in float32 would lose the small part.
    rows = 100 + random_matrix(4, 5)
    exact = rows.double().mT @ rows.double()
    gram, naive = GramSum(5, CPU), torch.zeros(5, 5)
    for _ in range(5000):
        gram.add(rows)
        naive += rows.mT @ rows
    assert float((gram.matrix() / 5000 / exact - 1).abs().max()) < 1e-6
    assert float((naive.double() / 5000 / exact - 1).abs().max()) > 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_are_multiplied_in_float32(dtype: torch.dtype) -> None:
    rows, gram = random_matrix(300, 5, dtype=dtype), GramSum(5, CPU)
    gram.add(rows)
    torch.testing.assert_close(gram.matrix(), rows.double().mT @ rows.double(), rtol=1e-5, atol=1e-4)


def test_a_clone_goes_its_own_way() -> None:
    first, rows = GramSum(4, CPU), random_matrix(6, 4, dtype=torch.float64)
    first.add(rows)
    second = first.clone()
    second.add(rows)
    torch.testing.assert_close(second.matrix(), 2 * first.matrix())
