"""Compression strategies: Lightning callbacks that a task owns. A plug-in is a subclass and a `class_path`."""

from lowrank_pl.strategies.base import CompressionStrategy
from lowrank_pl.strategies.calibration import Calibration
from lowrank_pl.strategies.fwsvd import FWSVD
from lowrank_pl.strategies.no_compression import NoCompression
from lowrank_pl.strategies.static import StaticStrategy
from lowrank_pl.strategies.svd import SVD

__all__ = ["FWSVD", "SVD", "Calibration", "CompressionStrategy", "NoCompression", "StaticStrategy"]
