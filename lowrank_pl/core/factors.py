"""A factorised weight. m: out_features, n: in_features, r: rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """`W ≈ left @ diag(sigma) @ right`.

    Attributes:
        left: `[m, r]`.
        sigma: `[r]`, `>= 0`, non-increasing.
        right: `[r, n]`.
    """

    left: Tensor
    sigma: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        """Number of singular groups `r`."""
        return self.sigma.numel()

    def product(self) -> Tensor:
        """The dense approximation `[m, n]`."""
        return (self.left * self.sigma) @ self.right

    def balanced(self) -> tuple[Tensor, Tensor]:
        """Two factors `A [m, r]`, `B [r, n]` with `A @ B` the product and `σ` split evenly.

        Equal scales on both sides keep one learning rate right for both factors.
        """
        root = self.sigma.sqrt()
        return self.left * root, root[:, None] * self.right

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> Factors:
        """The same factors in another dtype and, if one is given, on another device."""
        # The dtype first: a device without float64 could not take them otherwise.
        left, sigma, right = (part.to(dtype).to(device) for part in (self.left, self.sigma, self.right))
        return Factors(left, sigma, right)

    def like(self, tensor: Tensor) -> Factors:
        """The same factors in the dtype and on the device of a tensor."""
        return self.to(tensor.dtype, tensor.device)

    @classmethod
    def from_product(cls, a: Tensor, b: Tensor) -> Factors:
        """Brings `A [m, r] @ B [r, n]` into singular form without forming `[m, n]`.

        Two thin QR decompositions and an SVD of `[r, r]`. `left` has orthonormal columns and `right`
        orthonormal rows, whatever scales the method that made `A` and `B` left in them.
        """
        q_a, r_a = torch.linalg.qr(a)
        q_b, r_b = torch.linalg.qr(b.mT)
        u, sigma, vh = torch.linalg.svd(r_a @ r_b.mT, full_matrices=False)
        return cls(q_a @ u, sigma, vh @ q_b.mT)

    @classmethod
    def from_projection(cls, basis: Tensor, weight: Tensor) -> Factors:
        """Singular form of `U Uᵀ W`, for `U [m, r]` with orthonormal columns and `W [m, n]`."""
        q, triangle = torch.linalg.qr((basis.mT @ weight).mT)
        u, sigma, vh = torch.linalg.svd(triangle.mT, full_matrices=False)
        return cls(basis @ u, sigma, vh @ q.mT)
