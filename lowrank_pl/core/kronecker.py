"""The best approximation of a rank in a Kronecker metric. m: out_features, n: in_features, k: min(m, n), r: rank."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_pl.core.checks import check_finite, check_weight
from lowrank_pl.core.factors import Factors
from lowrank_pl.core.precision import double
from lowrank_pl.core.shapes import LinearShape
from lowrank_pl.errors.numerics import ImportanceError, RangeError, ShapeError

DEFAULT_DAMPING = 1e-3


@dataclass(frozen=True)
class KroneckerGroups:
    """A weight in singular groups of the metric `G ⊗ C`: what each is worth, and the factors at any rank.

    Attributes:
        left: `G^{-½} U`, `[m, k]`; with more outputs than inputs `W C^½ V`, the same columns times the roots of their
            energies.
        right: `Uᵀ G^½ W`, `[k, n]`, or `Vᵀ C^{-½}`; `left @ right` is the weight, or its first `k` groups.
        energies: `S²`, `[min(m, n)]`, float64, non-increasing: by how much the objective rises without the group.
    """

    left: Tensor
    right: Tensor
    energies: Tensor

    def factors(self, rank: int) -> Factors:
        """The best factors of a rank, in the dtype of the groups; `left` and `right` orthonormal."""
        factors = Factors.from_product(double(self.left[:, :rank]), double(self.right[:rank]))
        return factors.like(self.left)

    def relative_error(self, rank: int) -> float:
        """`‖G^½ (W − AB) C^½‖_F / ‖G^½ W C^½‖_F` at a rank; 0 for a weight without energy."""
        total = float(self.energies.sum())
        return math.sqrt(float(self.energies[rank:].sum()) / total) if total > 0 else 0.0

    def first(self, count: int) -> KroneckerGroups:
        """The same with no more than `count` groups kept in memory; all energies stay."""
        return KroneckerGroups(self.left[:, :count].clone(), self.right[:count].clone(), self.energies)

    def transposed(self) -> KroneckerGroups:
        """The groups of the transposed weight, with both moments in each other's place."""
        return KroneckerGroups(self.right.mT, self.left.mT, self.energies)

    def scaled(self, scale: float, like: Tensor) -> KroneckerGroups:
        """The same with energies times a number, and factors in the dtype and on the device of a tensor."""
        return KroneckerGroups(self.left.to(like), self.right.to(like), self.energies * scale)


def decomposing_bytes(shape: LinearShape) -> int:
    """What `kronecker_groups` takes of memory.

    In float64 the moment of the wider side, four matrices for the root of the other, and the weight in six forms.
    """
    k, wide = shape.full_rank, max(shape.out_features, shape.in_features)
    return 8 * (wide * wide + 4 * k * k + 6 * k * wide)


def kronecker_groups(
    weight: Tensor,
    input_moment: Tensor | None = None,
    output_moment: Tensor | None = None,
    damping: float = DEFAULT_DAMPING,
) -> KroneckerGroups:
    """Decomposes a weight in the metric `‖G^½ (W − Ŵ) C^½‖_F`.

    With `C` and `G` the second moments of a layer's inputs and output gradients, the squared norm is, up to a factor,
    the second-order rise of the loss if the Fisher information is taken as `G ⊗ C` (K-FAC). Any root will do for the
    norm: this uses the Cholesky factor `G = L Lᵀ`. With `U` the eigenvectors of `Lᵀ W C Wᵀ L`, which are the left
    singular vectors of `Lᵀ W C^½`, the factors are `A = L^{-ᵀ} U_r`, `B = U_rᵀ Lᵀ W`. With more outputs than inputs it
    is the same of `Wᵀ`, with `C` and `G` in each other's place: only the moment of the narrower side needs a root.
    All in float64. Plain SVD is the case `G = C = I`, whitening by inputs `G = I`, and FWSVD with both sides the case
    of two diagonals.

    Args:
        weight: `[m, n]`, finite, any floating dtype.
        input_moment: `C`, `[n, n]`, its diagonal `[n]`, or diagonal blocks `[n / s, s, s]`; symmetric and positive
            semi-definite; `None`: the identity.
        output_moment: `G`, the same of outputs.
        damping: Added to each diagonal *relative to its mean*, `>= 0`. All-zero moments count as the
            identity, with energies of zero.

    Returns:
        All `min(m, n)` groups in the weight's dtype; energies in the units of `G`, `C` and the weight.

    Raises:
        ShapeError, NonFiniteError: a bad weight or moment.
        ImportanceError: a moment with a negative diagonal entry.
        RangeError: a damping that is negative or not finite.

    References:
        Martens and Grosse, Optimizing neural networks with Kronecker-factored approximate curvature, ICML 2015 (the
        metric). With the input side alone it is the objective of DRONE (Chen et al., NeurIPS 2021) and SVD-LLM (Wang et
        al., ICLR 2025).
    """
    shape = check_weight(weight)
    if not (math.isfinite(damping) and damping >= 0):
        raise RangeError("damping", damping, "0 <= damping, relative to the mean of the diagonal")
    of_inputs = _Moment.of("input_moment", input_moment, shape.in_features, damping)
    of_outputs = _Moment.of("output_moment", output_moment, shape.out_features, damping)
    w = double(weight)
    if shape.out_features <= shape.in_features:
        groups = _groups(w, of_inputs, of_outputs.root())
    else:
        groups = _groups(w.mT, of_outputs, of_inputs.root()).transposed()
    return groups.scaled(of_inputs.scale * of_outputs.scale, weight)


def _groups(w: Tensor, wide: _Moment, narrow: _Root) -> KroneckerGroups:
    """Groups of a weight `[k, l]`, `k <= l`, in float64, with the energies of moments over their scales."""
    weighed = narrow.transposed_times(w)
    energies, vectors = _eigen(wide.times_from_right(weighed) @ weighed.mT)
    return KroneckerGroups(narrow.inverse_transposed_times(vectors), vectors.mT @ weighed, energies)


def kronecker_regroup(
    left: Tensor,
    right: Tensor,
    input_moment: Tensor | None = None,
    output_moment: Tensor | None = None,
    damping: float = DEFAULT_DAMPING,
) -> KroneckerGroups:
    """`kronecker_groups` of a product `left [m, r] @ right [r, n]`, for what a decomposition of `[r, r]` costs.

    With the QR decomposition `Lᵀ A = Q F`, the left singular vectors of `Lᵀ A B C^½` are `Q` times the eigenvectors of
    `F (B C Bᵀ) Fᵀ`; again with `C` and `G` in each other's place where there are more outputs than inputs.

    Args:
        left: `[m, r]`, finite, `r <= min(m, n)`.
        right: `[r, n]`.
        input_moment: See `kronecker_groups`.
        output_moment: See `kronecker_groups`.
        damping: See `kronecker_groups`.

    Returns:
        `r` groups, and as many energies.

    Raises:
        As `kronecker_groups`.
    """
    m, n = check_weight(left).out_features, check_weight(right).in_features
    if left.shape[1] != right.shape[0]:
        raise ShapeError("right", tuple(right.shape), f"[{left.shape[1]}, n], as many rows as left has columns")
    of_inputs = _Moment.of("input_moment", input_moment, n, damping)
    of_outputs = _Moment.of("output_moment", output_moment, m, damping)
    a, b = double(left), double(right)
    if m <= n:
        groups = _regrouped(a, b, of_inputs, of_outputs.root())
    else:
        groups = _regrouped(b.mT, a.mT, of_outputs, of_inputs.root()).transposed()
    return groups.scaled(of_inputs.scale * of_outputs.scale, left)


def _regrouped(a: Tensor, b: Tensor, wide: _Moment, narrow: _Root) -> KroneckerGroups:
    """The same of a product `a [k, r] @ b [r, l]`: `r` groups."""
    basis, triangle = torch.linalg.qr(narrow.transposed_times(a))
    energies, vectors = _eigen(triangle @ (wide.times_from_right(b) @ b.mT) @ triangle.mT)
    return KroneckerGroups(narrow.inverse_transposed_times(basis @ vectors), (vectors.mT @ triangle) @ b, energies)


def kronecker_svd(
    weight: Tensor,
    rank: int,
    input_moment: Tensor | None = None,
    output_moment: Tensor | None = None,
    damping: float = DEFAULT_DAMPING,
) -> Factors:
    """Minimises `‖G^½ (W − AB) C^½‖_F` at a rank; see `kronecker_groups`.

    Raises:
        RankError: a rank outside `1 … min(m, n)`; else as `kronecker_groups`.
    """
    check_weight(weight, rank)
    groups = kronecker_groups(double(weight), input_moment, output_moment, damping)
    return groups.factors(rank).like(weight)


def nearest_kronecker(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The product `a ⊗ b` that is nearest to `a₁ ⊗ b₁ + a₂ ⊗ b₂` in the Frobenius norm.

    A sum of products is a matrix of as many rows as `a` has entries and rank two; its best approximation of rank one
    follows from an SVD of `[2, 2]`. Where all four are positive semi-definite, so are both results.

    Args:
        first: `a₁` and `b₁`, of any shape.
        second: `a₂` and `b₂`, of the same shapes.

    Returns:
        `a` with the sum of its entries 1, where it is not zero, and `b`, in float64.

    References:
        Van Loan and Pitsianis, Approximation with Kronecker products, in Linear Algebra for Large Scale and Real-Time
        Applications, Kluwer, 1993.
    """
    lefts, rights = (
        torch.stack([double(part).flatten() for part in pair], 1) for pair in zip(first, second, strict=True)
    )
    (q_left, r_left), (q_right, r_right) = torch.linalg.qr(lefts), torch.linalg.qr(rights)
    u, sigma, vh = torch.linalg.svd(r_left @ r_right.mT)
    a, b = q_left @ u[:, 0], q_right @ vh[0] * sigma[0]
    total = a.sum()
    if bool(total != 0):
        a, b = a / total, b * total
    return a.view(first[0].shape), b.view(first[1].shape)


@dataclass(frozen=True)
class _Moment:
    """A moment over its scale, the mean of its diagonal: a matrix, a diagonal as a vector, or `None` for the identity.

    Attributes:
        damping: Still to be added to the diagonal.
    """

    matrix: Tensor | None
    scale: float = 1.0
    damping: float = 0.0

    @classmethod
    def of(cls, what: str, moment: Tensor | None, size: int, damping: float) -> _Moment:
        """One that was given; all-zero ones count as the identity, with a scale of zero."""
        if moment is None:
            return cls(None)
        moment = _checked(what, moment, size)
        diagonal = moment if moment.ndim == 1 else moment.diagonal()
        scale = float(double(diagonal).mean())
        if scale == 0:
            return cls(None, 0.0)
        exact = double(moment)
        relative = exact / scale if exact is moment else exact.div_(scale)  # one matrix in memory, not two
        # A diagonal of exactly zero would be divided by; one part in 10¹² of the mean is as good.
        return cls(relative, scale, max(damping, 1e-12))

    def times_from_right(self, matrix: Tensor) -> Tensor:
        """`X M`, damped."""
        if self.matrix is None:
            return matrix
        product = matrix * self.matrix if self.matrix.ndim == 1 else matrix @ self.matrix
        return product.add_(matrix, alpha=self.damping)

    def root(self) -> _Root:
        """`L` with `L Lᵀ` the damped moment."""
        if self.matrix is None:
            return _Root(None)
        if self.matrix.ndim == 1:
            return _Root((self.matrix + self.damping).sqrt())
        matrix = self.matrix.clone()
        matrix.diagonal().add_(self.damping)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if bool(failed):
            # Rounding has made the smallest eigenvalues of a singular moment negative: lift them to the damping.
            values, vectors = torch.linalg.eigh(matrix)
            root = vectors * values.clamp(min=self.damping).sqrt()
            factor = torch.linalg.qr(root.mT)[1].mT
        return _Root(factor)


@dataclass(frozen=True)
class _Root:
    """`L`: triangular, a diagonal as a vector, or `None` for the identity."""

    factor: Tensor | None

    def transposed_times(self, matrix: Tensor) -> Tensor:
        """`Lᵀ X`."""
        if self.factor is None:
            return matrix
        return self.factor[:, None] * matrix if self.factor.ndim == 1 else self.factor.mT @ matrix

    def inverse_transposed_times(self, matrix: Tensor) -> Tensor:
        """`L^{-ᵀ} X`."""
        if self.factor is None:
            return matrix
        if self.factor.ndim == 1:
            return matrix / self.factor[:, None]
        solved: Tensor = torch.linalg.solve_triangular(self.factor.mT, matrix, upper=True)
        return solved


def _checked(what: str, moment: Tensor, size: int) -> Tensor:
    """The moment as a matrix or a diagonal."""
    if moment.ndim == 3 and moment.shape[0] * moment.shape[1] == size and moment.shape[1] == moment.shape[2]:
        moment = torch.block_diag(*moment)
    if tuple(moment.shape) not in ((size,), (size, size)):
        raise ShapeError(what, tuple(moment.shape), f"[{size}, {size}], its diagonal [{size}], or diagonal blocks")
    check_finite(what, moment)
    diagonal = moment if moment.ndim == 1 else moment.diagonal()
    if bool((diagonal < 0).any()):
        position = int(torch.nonzero(diagonal < 0)[0])
        raise ImportanceError(what, float(diagonal[position]), (position,) * moment.ndim)
    return moment


def _eigen(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues `[k]`, non-increasing, and eigenvectors `[k, k]` of `Lᵀ W C Wᵀ L`: energies and what they belong to.

    Energies are exact to float64's accuracy relative to the largest. Vectors of groups with less than 10⁻¹⁶ of that are
    any basis of what is left, which changes no product by more than rounding.
    """
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0).clamp(min=0), vectors.flip(1)
