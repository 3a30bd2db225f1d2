"""Seeded random matrices that leave the global random state alone."""

import torch
from torch import Tensor


def random_matrix(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_importance(size: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Positive, spread over about four orders of magnitude."""
    return (2 * random_matrix(size, seed=seed, dtype=torch.float64)).exp().to(dtype)
