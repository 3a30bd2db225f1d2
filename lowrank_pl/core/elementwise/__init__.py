"""Element-wise weighted low-rank approximation: `min Σ_ij F_ij (W_ij − (A B)_ij)²`, which has no closed form.

Shapes throughout: `W`, `F` `[m, n]`; `A [m, r]`; `B [r, n]`.
"""

from lowrank_pl.core.elementwise.als import ALS
from lowrank_pl.core.elementwise.em import EM
from lowrank_pl.core.elementwise.first_order import SGD, Adam, AdamSGD
from lowrank_pl.core.elementwise.lbfgs import PreconditionedLBFGS
from lowrank_pl.core.elementwise.problem import WeightedProblem, shrink_importance
from lowrank_pl.core.elementwise.solve import best_closed_form, weighted_low_rank
from lowrank_pl.core.elementwise.solver import ElementwiseSolver, SolveResult

__all__ = [
    "ALS",
    "EM",
    "SGD",
    "Adam",
    "AdamSGD",
    "ElementwiseSolver",
    "PreconditionedLBFGS",
    "SolveResult",
    "WeightedProblem",
    "best_closed_form",
    "shrink_importance",
    "weighted_low_rank",
]
