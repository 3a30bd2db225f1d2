"""What a person and a program can see of a run: reports, TensorBoard, predictions."""

from lowrank_pl.monitoring.config_writer import ConfigWriter
from lowrank_pl.monitoring.prediction_writer import PredictionWriter
from lowrank_pl.monitoring.rank_dashboard import RankDashboard
from lowrank_pl.monitoring.rank_history import RankHistory
from lowrank_pl.monitoring.rank_picture import rank_heatmap
from lowrank_pl.monitoring.report import build_report, write_report
from lowrank_pl.monitoring.report_writer import ReportWriter
from lowrank_pl.monitoring.run_folder import check_unused, run_folder
from lowrank_pl.monitoring.run_logger import RunLogger
from lowrank_pl.monitoring.stopping_signal import stopping_signal

__all__ = [
    "ConfigWriter",
    "PredictionWriter",
    "RankDashboard",
    "RankHistory",
    "ReportWriter",
    "RunLogger",
    "build_report",
    "check_unused",
    "rank_heatmap",
    "run_folder",
    "stopping_signal",
    "write_report",
]
