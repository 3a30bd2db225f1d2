"""Tensors in, tensors out: factorisations of one weight matrix. Needs torch alone.

Shapes throughout: `weight` is `[out, in] = [m, n]`, `r` is the rank.
"""

from lowrank_pl.core.axis_weighted import axis_weighted_svd
from lowrank_pl.core.compensation import Compensation, PairedSums, compensation
from lowrank_pl.core.diagnosis import Diagnosis, compare_methods, diagnose
from lowrank_pl.core.diagnostics import relative_error
from lowrank_pl.core.elementwise import weighted_low_rank
from lowrank_pl.core.factors import Factors
from lowrank_pl.core.kronecker import (
    KroneckerGroups,
    decomposing_bytes,
    kronecker_groups,
    kronecker_regroup,
    kronecker_svd,
    nearest_kronecker,
)
from lowrank_pl.core.pivoted import Pivoted, pivoted
from lowrank_pl.core.refit import refit_left
from lowrank_pl.core.shapes import EmbeddingShape, LinearShape
from lowrank_pl.core.svd import singular_values, truncated_svd

__all__ = [
    "Compensation",
    "Diagnosis",
    "EmbeddingShape",
    "Factors",
    "KroneckerGroups",
    "LinearShape",
    "PairedSums",
    "Pivoted",
    "axis_weighted_svd",
    "compare_methods",
    "compensation",
    "decomposing_bytes",
    "diagnose",
    "kronecker_groups",
    "kronecker_regroup",
    "kronecker_svd",
    "nearest_kronecker",
    "pivoted",
    "refit_left",
    "relative_error",
    "singular_values",
    "truncated_svd",
    "weighted_low_rank",
]
