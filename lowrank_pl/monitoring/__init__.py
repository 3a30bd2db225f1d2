"""What a person and a program can see of a run: reports, TensorBoard, predictions."""

from lowrank_pl.monitoring.prediction_writer import PredictionWriter
from lowrank_pl.monitoring.rank_dashboard import RankDashboard
from lowrank_pl.monitoring.rank_history import RankHistory
from lowrank_pl.monitoring.rank_picture import rank_heatmap
from lowrank_pl.monitoring.report import build_report, write_report
from lowrank_pl.monitoring.report_writer import ReportWriter

__all__ = [
    "PredictionWriter",
    "RankDashboard",
    "RankHistory",
    "ReportWriter",
    "build_report",
    "rank_heatmap",
    "write_report",
]
