"""Compression strategies: Lightning callbacks that a task owns. A plug-in is a subclass and a `class_path`."""

from lowrank_pl.strategies.any_module import compress
from lowrank_pl.strategies.base import CompressionStrategy
from lowrank_pl.strategies.block_by_block import BlockByBlock
from lowrank_pl.strategies.calibration import Calibration
from lowrank_pl.strategies.decomposition import ByGroups, ByRank, Decomposition, Factorised
from lowrank_pl.strategies.fwsvd import FWSVD
from lowrank_pl.strategies.kronecker_svd import KroneckerSVD
from lowrank_pl.strategies.no_compression import NoCompression
from lowrank_pl.strategies.rank_plan import RankPlan
from lowrank_pl.strategies.rank_state import Reallocation
from lowrank_pl.strategies.rankdyna import RankDyna
from lowrank_pl.strategies.recalibration import Recalibration
from lowrank_pl.strategies.refit import Refit
from lowrank_pl.strategies.static import StaticStrategy
from lowrank_pl.strategies.svd import SVD
from lowrank_pl.strategies.tfwsvd import TFWSVD

__all__ = [
    "FWSVD",
    "SVD",
    "TFWSVD",
    "BlockByBlock",
    "ByGroups",
    "ByRank",
    "Calibration",
    "CompressionStrategy",
    "Decomposition",
    "Factorised",
    "KroneckerSVD",
    "NoCompression",
    "RankDyna",
    "RankPlan",
    "Reallocation",
    "Recalibration",
    "Refit",
    "StaticStrategy",
    "compress",
]
