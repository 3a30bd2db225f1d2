"""The best approximation of a rank in a Kronecker metric. m: out_features, n: in_features, k: min(m, n), r: rank."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_pl.core.checks import check_finite, check_weight
from lowrank_pl.core.factors import Factors
from lowrank_pl.core.precision import double
from lowrank_pl.errors.numerics import ImportanceError, RangeError, ShapeError

DEFAULT_DAMPING = 1e-3


@dataclass(frozen=True)
class KroneckerGroups:
    """A weight in singular groups of the metric `G ⊗ C`: what each is worth, and the factors at any rank.

    Attributes:
        left: `G^{-½} U`, `[m, k]`.
        right: `Uᵀ G^½ W`, `[k, n]`; `left @ right` is the weight, or its first `k` groups.
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


def kronecker_groups(
    weight: Tensor,
    input_moment: Tensor | None = None,
    output_moment: Tensor | None = None,
    damping: float = DEFAULT_DAMPING,
) -> KroneckerGroups:
    """Decomposes a weight in the metric `‖G^½ (W − Ŵ) C^½‖_F`.

    With `C` and `G` the second moments of a layer's inputs and output gradients, the squared norm is, up to a factor,
    the second-order rise of the loss if the Fisher information is taken as `G ⊗ C` (K-FAC). Any root will do for the
    norm: this uses Cholesky factors `C = R Rᵀ`, `G = L Lᵀ`. With `U` the left singular vectors of `Lᵀ W R` the factors
    are `A = L^{-ᵀ} U_r`, `B = U_rᵀ Lᵀ W`: nothing is divided by `C`, so directions that no input ever took cost no
    accuracy. All in float64. Plain SVD is the case `G = C = I`, whitening by inputs `G = I`, and FWSVD with both
    sides the case of two diagonals.

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
    right = _root("input_moment", input_moment, shape.in_features, damping)
    left = _root("output_moment", output_moment, shape.out_features, damping)
    w = double(weight)
    weighed = left.transposed_times(w)
    metric = right.times_from_right(weighed)
    energies, vectors = _left_groups(metric)
    groups = KroneckerGroups(left.inverse_transposed_times(vectors), vectors.mT @ weighed, energies)
    scale = left.scale * right.scale
    return KroneckerGroups(groups.left.to(weight), groups.right.to(weight), energies * scale)


def kronecker_regroup(
    left: Tensor,
    right: Tensor,
    input_moment: Tensor | None = None,
    output_moment: Tensor | None = None,
    damping: float = DEFAULT_DAMPING,
) -> KroneckerGroups:
    """`kronecker_groups` of a product `left [m, r] @ right [r, n]`, for what a decomposition of `[r, r]` costs.

    With `Y = B R` and the QR decomposition `Yᵀ = Q F`, `Lᵀ A B R = Lᵀ A Fᵀ Qᵀ` has the singular values and left
    vectors of `Lᵀ A Fᵀ [m, r]`.

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
    of_inputs = _root("input_moment", input_moment, n, damping)
    of_outputs = _root("output_moment", output_moment, m, damping)
    a, b = double(left), double(right)
    weighed = of_outputs.transposed_times(a)
    triangle = torch.linalg.qr(of_inputs.times_from_right(b).mT)[1]
    energies, vectors = _left_groups(weighed @ triangle.mT)
    new_left = of_outputs.inverse_transposed_times(vectors)
    new_right = (vectors.mT @ weighed) @ b
    scale = of_outputs.scale * of_inputs.scale
    return KroneckerGroups(new_left.to(left), new_right.to(left), energies * scale)


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
class _Root:
    """`L` with `scale · L Lᵀ` the damped moment: triangular, a diagonal as a vector, or `None` for the identity."""

    factor: Tensor | None
    scale: float = 1.0

    def transposed_times(self, matrix: Tensor) -> Tensor:
        """`Lᵀ X`."""
        if self.factor is None:
            return matrix
        return self.factor[:, None] * matrix if self.factor.ndim == 1 else self.factor.mT @ matrix

    def times_from_right(self, matrix: Tensor) -> Tensor:
        """`X L`."""
        if self.factor is None:
            return matrix
        return matrix * self.factor if self.factor.ndim == 1 else matrix @ self.factor

    def inverse_transposed_times(self, matrix: Tensor) -> Tensor:
        """`L^{-ᵀ} X`."""
        if self.factor is None:
            return matrix
        if self.factor.ndim == 1:
            return matrix / self.factor[:, None]
        solved: Tensor = torch.linalg.solve_triangular(self.factor.mT, matrix, upper=True)
        return solved


def _root(what: str, moment: Tensor | None, size: int, damping: float) -> _Root:
    if moment is None:
        return _Root(None)
    moment = double(_checked(what, moment, size))
    diagonal = moment if moment.ndim == 1 else moment.diagonal()
    scale = float(diagonal.mean())
    if scale == 0:
        return _Root(None, 0.0)
    # A diagonal of exactly zero would be divided by; one part in 10¹² of the mean is as good.
    damped = max(damping, 1e-12)
    if moment.ndim == 1:
        return _Root((moment / scale + damped).sqrt(), scale)
    matrix = moment / scale
    matrix.diagonal().add_(damped)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if bool(failed):
        # Rounding has made the smallest eigenvalues of a singular moment negative: lift them to the damping.
        values, vectors = torch.linalg.eigh(matrix)
        root = vectors * values.clamp(min=damped).sqrt()
        factor = torch.linalg.qr(root.mT)[1].mT
    return _Root(factor, scale)


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


def _left_groups(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Squared singular values `[k]` and left singular vectors `[m, k]`, from the smaller Gram matrix.

    Its eigenvalues are the energies to float64's accuracy relative to the largest. Vectors of groups with less than
    10⁻¹⁶ of that are any basis of what is left, which changes no product by more than rounding.
    """
    m, n = matrix.shape
    gram = matrix @ matrix.mT if m <= n else matrix.mT @ matrix
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    if m > n:
        vectors = torch.linalg.qr(matrix @ vectors)[0]
    return values, vectors
