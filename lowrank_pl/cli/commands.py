"""The command line: LightningCLI with more verbs. Everything else is configuration."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import lowrank_pl.data
import lowrank_pl.strategies
import lowrank_pl.tasks  # noqa: F401, importing the packages makes short class names work
from lowrank_pl.checkpoint import check_loadable, check_resumable
from lowrank_pl.cli.configuration import refuse_interpolation, without_needless_monitors
from lowrank_pl.cli.functions import FUNCTIONS, run_function
from lowrank_pl.cli.outcome import outcome
from lowrank_pl.cli.parser import Parser
from lowrank_pl.cli.quiet import quieten, quieten_scoring
from lowrank_pl.cli.stopped import stopped
from lowrank_pl.cli.verbs import PROGRAM
from lowrank_pl.data import TextDataModule
from lowrank_pl.errors import LowRankError
from lowrank_pl.errors.arguments import ConstructionError, MissingArgumentError
from lowrank_pl.errors.run import RunStoppedError
from lowrank_pl.monitoring import (
    ConfigWriter,
    PredictionWriter,
    RankDashboard,
    RankHistory,
    ReportWriter,
    check_unused,
    stopping_signal,
)
from lowrank_pl.strategies.processes import check_parallelism, check_parallelism_named
from lowrank_pl.tasks import EncoderTask
from lowrank_pl.tasks.model_arguments import model_arguments
from lowrank_pl.trainer import LowRankTrainer

logger = logging.getLogger(__name__)

_LOGGER = {
    "class_path": "lowrank_pl.monitoring.RunLogger",
    "init_args": {"save_dir": "logs", "name": "runs"},
}
_WITH_CHECKPOINT = ("validate", "test", "predict", "compress", "diagnose")
_CHECKPOINT_WORDS = ("best", "last", "hpc")


class LowRankCLI(LightningCLI):
    """`fit validate test predict` of Lightning, `compress`, `diagnose` and `inspect` of this package."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        words = sys.argv[1:] if kwargs.get("args") is None else kwargs["args"]
        first = words[0] if isinstance(words, list) and words else None
        self._typed = first if first in self.subcommands() else None
        super().__init__(*args, **kwargs)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The verbs and the arguments that do not come from the command line."""
        own = {verb: {"model", "datamodule"} for verb in ("compress", "diagnose", "inspect")}
        return {**LightningCLI.subcommands(), **own}

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """As Lightning's; a verb is called in usage and errors as it is typed."""
        super()._add_subcommands(parser, **kwargs)
        for verb, subparser in self._subcommand_parsers.items():
            subparser.prog = f"{PROGRAM} {verb}"

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """As Lightning's; where a verb was typed, the others get no options: seven times as many take half a second."""
        if self._typed in (None, subcommand):
            return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        self._subcommand_method_arguments[subcommand] = []
        return self.init_parser(**kwargs)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Raises an error for a checkpoint that cannot be used, and interpolation, before anything is built."""
        words = sys.argv[1:] if args is None else args
        if isinstance(words, list) and words and words[0] in _WITH_CHECKPOINT:
            # What the checkpoint contains comes first: configurations and arguments overrule it.
            self.config = parser.parse_args([words[0], *model_arguments(words[1:]), *words[1:]])
        else:
            super().parse_arguments(parser, args)
        verb = self.config.get("subcommand")
        refuse_interpolation(self.config[verb])
        path = self.config[verb].get("ckpt_path") if verb else None
        if path is not None and path not in _CHECKPOINT_WORDS:
            (check_resumable if verb == "fit" else check_loadable)(str(path))
        model = self.config[verb].get("model") if verb else None
        if model is not None and model.get("init_args", {}).get("pretrained") is None and self.config[verb].get("data"):
            raise MissingArgumentError(
                "model.init_args.pretrained",
                "The data take their tokenizer from it, also when the weights come from init_from.",
            )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """As Lightning's, with data optional: `inspect` needs none."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{key}": value for key, value in self.trainer_defaults.items()})
        parser.add_lightning_class_args(EncoderTask, "model", subclass_mode=True)
        parser.add_lightning_class_args(TextDataModule, "data", subclass_mode=True, required=False)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The callbacks that every run has, and the tokenizer of the pre-trained encoder for the data."""
        parser.add_lightning_class_args(ReportWriter, "report")
        parser.add_lightning_class_args(RankDashboard, "rank_dashboard")
        parser.add_lightning_class_args(RankHistory, "rank_history")
        parser.add_lightning_class_args(PredictionWriter, "prediction_writer")
        parser.link_arguments("model.init_args.pretrained", "data.init_args.tokenizer")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Raises an error for processes that lose the trained model, and for the folder of another run."""
        trainer = super().instantiate_trainer(**kwargs)
        training_only = "" if self.subcommand == "fit" else "parameters are divided for training alone, in the verb fit"
        check_parallelism(trainer.strategy, "lowrank-pl", training_only)
        if self.subcommand != "inspect":
            check_unused(trainer)
        return trainer

    def instantiate_classes(self) -> None:
        """Makes everything that is configured; what a constructor rejects is reported as bad input.

        Raises:
            ConstructionError: a class rejects its arguments, or a package that it needs is missing.
        """
        trainer = self.config[self.subcommand]["trainer"]
        if not trainer.get("logger"):
            for left_out in without_needless_monitors(trainer):
                logger.warning("%s is left out: there is no logger that it could write to", left_out)
        kind = trainer.get("strategy")
        check_parallelism_named(str(getattr(kind, "class_path", kind)).rpartition(".")[2], "lowrank-pl")
        try:
            super().instantiate_classes()
        except (ValueError, ImportError) as error:
            if _own_error(error) is not None:
                raise
            raise ConstructionError.of(error) from error

    def before_fit(self) -> None:
        """Raises an error for what the optimizer does not take, before data are prepared."""
        self.model.check_optimizer()

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs a verb and prints where its files are, also where a signal has stopped it.

        Raises:
            RunStoppedError: by the first process; the others leave with its code.
        """
        if subcommand != "fit":
            quieten_scoring()
        started = time.time()
        ended: RunStoppedError | None = None
        try:
            super()._run_subcommand(subcommand)
        except SystemExit as left:
            number = stopping_signal(left)
            if number is None:
                raise
            ended = stopped(self.trainer, self.model, subcommand, number, started)
        for line in outcome(self.trainer):
            print(line)
        if ended is not None:
            if not self.trainer.is_global_zero:
                sys.exit(ended.code)
            raise ended


def run(args: list[str] | dict[str, Any] | None = None) -> None:
    """Runs a verb; see `lowrank_pl.cli.main`."""
    quieten()
    try:
        _run(args)
    except ValueError as error:
        # jsonargparse wraps what a constructor raises into an error about union types.
        own = _own_error(error)
        if own is None or own is error:
            raise
        raise own from None


def _run(args: list[str] | dict[str, Any] | None) -> None:
    words = sys.argv[1:] if args is None else args
    if isinstance(words, list) and words and words[0] in FUNCTIONS:
        print(f"written to {run_function(words[0], words[1:])}")
        return
    LowRankCLI(
        model_class=EncoderTask,
        datamodule_class=TextDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        trainer_class=LowRankTrainer,
        trainer_defaults={"logger": _LOGGER},
        seed_everything_default=0,
        # Lightning's own would take the parameters that exist at parse time, before any layer is swapped.
        auto_configure_optimizers=False,
        save_config_callback=ConfigWriter,
        parser_class=Parser,
        parser_kwargs={"prog": PROGRAM},
        args=args,
    )


def _own_error(error: BaseException | None) -> LowRankError | None:
    """The innermost exception of this package in a chain; what is raised `from None` ends it."""
    found = None
    while error is not None:
        found = error if isinstance(error, LowRankError) else found
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return found
