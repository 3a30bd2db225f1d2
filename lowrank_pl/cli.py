"""The command line: LightningCLI with more verbs. Everything else is configuration."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from jsonargparse import auto_cli
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import lowrank_pl.data
import lowrank_pl.strategies
import lowrank_pl.tasks  # noqa: F401, importing the rooms makes short class names work
from lowrank_pl.benchmark import benchmark
from lowrank_pl.data import TextDataModule
from lowrank_pl.errors import LowRankError
from lowrank_pl.errors.run import MissingArgumentError
from lowrank_pl.export import export
from lowrank_pl.monitoring import PredictionWriter, RankDashboard, RankHistory, ReportWriter
from lowrank_pl.tasks import EncoderTask
from lowrank_pl.tasks.saved import check_loadable, check_resumable
from lowrank_pl.trainer import LowRankTrainer

_LOGGER = {
    "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
    "init_args": {"save_dir": "logs", "name": "runs"},
}


_DESCRIPTION = """Low-rank compression of transformers. Beside the verbs below,
`export --ckpt_path CHECKPOINT --output DIR` writes a Hugging Face folder, and
`benchmark --models DENSE OTHER… --output DIR` times models and layers; see `export --help`, `benchmark --help`."""
_FUNCTIONS: dict[str, Callable[..., Path]] = {"export": export, "benchmark": benchmark}
_CHECKPOINT_WORDS = ("best", "last", "hpc")


class LowRankCLI(LightningCLI):
    """`fit validate test predict` of Lightning, `compress`, `diagnose` and `inspect` of this package."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The verbs and the arguments that do not come from the command line."""
        own = {verb: {"model", "datamodule"} for verb in ("compress", "diagnose", "inspect")}
        return {**LightningCLI.subcommands(), **own}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Refuses a checkpoint that cannot be used before anything is built."""
        super().parse_arguments(parser, args)
        verb = self.config.get("subcommand")
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


def main(args: list[str] | dict[str, Any] | None = None) -> None:
    """Runs the command line.

    Args:
        args: Arguments instead of `sys.argv[1:]`, e.g. `["fit", "--config", "run.yaml"]`.

    Raises:
        LowRankError: bad input, of one of its subclasses.
    """
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
    if isinstance(words, list) and words and words[0] in _FUNCTIONS:
        # A checkpoint tells everything that is needed: no trainer, model or data to configure.
        verb, function = words[0], _FUNCTIONS[words[0]]
        given = _joined(words[1:], _lists(function))
        print(f"written to {auto_cli(function, args=given, as_positional=False, prog=f'lowrank-pl {verb}')}")
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
        parser_kwargs={"description": _DESCRIPTION},
        args=args,
    )


def _lists(function: Callable[..., object]) -> dict[str, bool]:
    """The arguments that are lists, and whether they are lists of numbers."""
    hints = get_type_hints(function)
    return {name: get_args(hint)[0] is int for name, hint in hints.items() if get_origin(hint) is list}


def _joined(words: list[str], lists: Mapping[str, bool]) -> list[str]:
    """`--models A B` as `--models=[A, B]`, the form in which jsonargparse takes a list."""
    joined: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word.removeprefix("--") not in lists or not word.startswith("--"):
            joined.append(word)
            continue
        values = list(itertools.takewhile(lambda value: not value.startswith("--"), rest))
        del rest[: len(values)]
        if len(values) == 1 and values[0].startswith("["):
            joined.append(f"{word}={values[0]}")
        else:
            numbers = lists[word.removeprefix("--")]
            joined.append(f"{word}=[{', '.join(values if numbers else map(json.dumps, values))}]")
    return joined


def _own_error(error: BaseException | None) -> LowRankError | None:
    """The innermost exception of this package in a chain."""
    found = None
    while error is not None:
        found = error if isinstance(error, LowRankError) else found
        error = error.__cause__ or error.__context__
    return found


def console() -> None:
    """`main` for the shell: bad input ends in its message and exit code 1, without a traceback."""
    try:
        main()
    except (LowRankError, MisconfigurationException, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
