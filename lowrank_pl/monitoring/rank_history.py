"""Shrinking ranks in TensorBoard and in the run folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from lowrank_pl.allocation import Parameters
from lowrank_pl.core import LinearShape
from lowrank_pl.monitoring.earlier_run import folders_of
from lowrank_pl.monitoring.rank_flow import dense_parameters, flow_figure, kept_by_kind
from lowrank_pl.monitoring.rank_picture import grid_position, rank_heatmap
from lowrank_pl.monitoring.run_folder import run_folder
from lowrank_pl.monitoring.stopping_signal import stopping_signal
from lowrank_pl.nn import forms_in_training
from lowrank_pl.strategies import RankDyna, RankPlan, Reallocation
from lowrank_pl.surgery.record import DENSE
from lowrank_pl.tasks import EncoderTask, budget_score

_HISTORY, _PICTURE = "rank_history.json", "rank_flow.png"


class RankHistory(pl.Callback):
    """Shows every reallocation of `RankDyna`.

    In TensorBoard: `budget/kept` and `budget/scheduled` (shares of what the dense layers cost), `rank/<layer>`,
    `kept_by_kind/<kind>`, histograms `importance/<kind>` (log10 of the
    scores or energies that decided), the heat map `ranks`, a
    layout that puts the curves that belong together in one chart (tab Custom Scalars); at the end `rank_table` and the
    hyper-parameters with the score at the budget. In the run folder: `rank_history.json` and `rank_flow.png`.
    """

    def __init__(self) -> None:
        self._shown = 0
        self._shapes: dict[str, LinearShape] = {}
        self._folder: Path | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Looks for the folder."""
        del pl_module
        self._folder = run_folder(trainer)  # on every process: it is a collective operation
        self._shapes = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lays out the charts."""
        self._shown = 0
        strategy = _strategy(trainer, pl_module)
        if strategy is None:
            return
        assert isinstance(pl_module, EncoderTask)
        self._shapes = {name: layer.shape for name, layer in forms_in_training(pl_module.encoder).items()}
        kinds = list(dict.fromkeys(grid_position(name)[1] for name in self._shapes))
        ranks = {k: ["Multiline", [f"rank/{n}" for n in self._shapes if grid_position(n)[1] == k]] for k in kinds}
        layout = {
            "budget": {"kept and scheduled": ["Multiline", ["budget/kept", "budget/scheduled"]]},
            "flow": {"parameters by kind": ["Multiline", [f"kept_by_kind/{kind}" for kind in kinds]]},
            "ranks": ranks,
        }
        for logger in _writers(trainer):
            logger.experiment.add_custom_scalars(layout)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Shows what the step before has changed: the strategy's hook runs after this callback's of the same step."""
        del batch, batch_idx
        self._show(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Shows the last reallocation, and writes table, history and picture."""
        strategy = _strategy(trainer, pl_module)
        if strategy is None or not self._shapes:
            return
        self._show(trainer, pl_module)
        score = trainer.callback_metrics.get(budget_score.KEY)
        for logger in _writers(trainer):
            logger.experiment.add_text(
                "rank_table", _table(strategy.frame, strategy.state.history), trainer.global_step
            )
            _log_hyperparameters(logger, strategy, score)
        self._write(strategy, trainer.global_step)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes along the history of a run that was resumed at its very end, and had nothing left to train."""
        resumed = trainer.ckpt_path
        if _strategy(trainer, pl_module) is None or self._shapes or self._folder is None or resumed is None:
            return
        for name in (_HISTORY, _PICTURE):
            for folder in folders_of(Path(resumed)):
                if (folder / name).is_file() and not (self._folder / name).exists():
                    self._folder.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(folder / name, self._folder / name)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Writes history and picture of a run that a signal has stopped, as far as they go."""
        strategy = _strategy(trainer, pl_module)
        if stopping_signal(exception) is not None and strategy is not None and self._shapes:
            self._write(strategy, trainer.global_step)

    def _show(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy = _strategy(trainer, pl_module)
        if strategy is None:
            return
        history = strategy.state.history
        fresh = [entry for entry in history[self._shown :] if entry.step <= trainer.global_step]
        if self._shown == 0 and len(fresh) > 1:
            fresh = fresh[-1:]  # the others were shown by the run that this one resumes
        self._shown = len(history)
        for entry in fresh:
            for logger in _writers(trainer):
                self._log(logger.experiment, entry, strategy)

    def _log(self, writer: Any, entry: Reallocation, strategy: RankDyna) -> None:
        dense, scores = dense_parameters(self._shapes), strategy.latest_scores
        writer.add_scalar("budget/kept", entry.kept / strategy.frame.dense_cost, entry.step)
        writer.add_scalar("budget/scheduled", entry.scheduled / strategy.frame.dense_cost, entry.step)
        for name, rank in entry.ranks.items():
            writer.add_scalar(f"rank/{name}", rank, entry.step)
        for kind, kept in kept_by_kind(strategy.frame, entry.ranks).items():
            writer.add_scalar(f"kept_by_kind/{kind}", kept / dense, entry.step)
            mine = [score.flatten().float().cpu() for name, score in scores.items() if grid_position(name)[1] == kind]
            if mine:
                writer.add_histogram(f"importance/{kind}", torch.cat(mine).clamp(min=1e-30).log10(), entry.step)
        writer.add_figure("ranks", rank_heatmap(strategy.frame.records(entry.ranks)), entry.step)

    def _write(self, strategy: RankDyna, last_step: int) -> None:
        folder = self._folder
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        state = strategy.state
        told = {
            "budget": state.budget,
            "dense": strategy.frame.dense_cost,
            "unit": strategy.frame.cost.measure.unit,
            "reached": state.reached,
            "skipped_steps": state.skipped,
            "shapes": {name: [shape.out_features, shape.in_features] for name, shape in self._shapes.items()},
            "capacities": state.capacities,
            "history": [vars(entry) for entry in state.history],
        }
        (folder / _HISTORY).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        flow_figure(strategy.frame, state.history, last_step).savefig(folder / _PICTURE, dpi=130)


def _strategy(trainer: pl.Trainer, pl_module: pl.LightningModule) -> RankDyna | None:
    """The strategy, on the one process that writes."""
    if not isinstance(pl_module, EncoderTask) or not trainer.is_global_zero:
        return None
    return pl_module.strategy if isinstance(pl_module.strategy, RankDyna) else None


def _writers(trainer: pl.Trainer) -> list[TensorBoardLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def _table(plan: RankPlan, history: list[Reallocation]) -> str:
    ranks = history[-1].ranks if history else {}
    parameters = Parameters().in_form(plan.cost.measure.form)
    lines = ["| layer | out | in | full rank | break-even | rank | parameters |", "|---|---|---|---|---|---|---|"]
    for layer in plan.records(ranks):
        shape = plan.shapes[layer.name]
        rank = layer.kind if layer.kind == DENSE else str(layer.rank)
        sizes = (shape.out_features, shape.in_features, shape.full_rank, parameters.break_even(shape), rank)
        lines.append(f"| {layer.name} | {' | '.join(str(size) for size in sizes)} | {layer.parameters:,} |")
    return "\n".join(lines)


def _log_hyperparameters(logger: TensorBoardLogger, strategy: RankDyna, score: torch.Tensor | None) -> None:
    """Options beside the score of the model at its budget; a run that never reached it has none."""
    if score is None or not budget_score.is_score(float(score)):
        return
    flat: dict[str, Any] = {}
    for key, value in strategy.options().items():
        parts = value if isinstance(value, dict) else {"": value}
        flat |= {f"{key}.{part}".rstrip("."): str(v) if isinstance(v, list) else v for part, v in parts.items()}
    shown = {key: value for key, value in flat.items() if value is not None}
    logger.log_hyperparams({"method": type(strategy).__name__, **shown}, {"hp/score_at_budget": float(score)})
