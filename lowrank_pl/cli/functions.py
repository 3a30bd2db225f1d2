"""Verbs that are functions: a checkpoint contains all they need, so no trainer, model or data are configured."""

from __future__ import annotations

import inspect
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import auto_cli

from lowrank_pl.benchmark import benchmark
from lowrank_pl.cli.parser import Parser
from lowrank_pl.cli.verbs import PROGRAM
from lowrank_pl.evaluation import evaluate
from lowrank_pl.export import export

FUNCTIONS: dict[str, Callable[..., Path]] = {"export": export, "evaluate": evaluate, "benchmark": benchmark}
_CONFIG = "--config"
_OF_A_RUN = {"model", "trainer", "seed_everything"}
"""Keys that the configuration of a run has, and that of a function has not."""


def run_function(verb: str, words: list[str]) -> Path:
    """Runs a verb of `FUNCTIONS` with its words of the command line; returns what it has written."""
    function = FUNCTIONS[verb]
    given = _joined(words, _lists(function))
    if "data" in inspect.signature(function).parameters:
        given = _with_data_of_runs(given)
    description = (inspect.getdoc(function) or "").split("\n\n")[0]
    written: Path = auto_cli(
        function,
        args=given,
        as_positional=False,
        parser_class=Parser,
        prog=f"{PROGRAM} {verb}",
        description=description,
    )
    return written


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


def _with_data_of_runs(words: list[str]) -> list[str]:
    """`--config run.yaml` with nothing but the data of the run: a checkpoint contains all the rest.

    The tokenizer is left out as well: a function takes that of the model. Other files pass as they are.
    """
    changed: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        path = rest[0] if word == _CONFIG and rest else word.removeprefix(f"{_CONFIG}=")
        if (word != _CONFIG or not rest) and path == word:
            changed.append(word)
            continue
        if word == _CONFIG:
            rest.pop(0)
        fields = _fields_of(Path(path).expanduser())
        if not _OF_A_RUN & fields.keys():
            changed.append(f"{_CONFIG}={path}")
        elif data := fields.get("data"):
            changed.append(f"{_CONFIG}={json.dumps({'data': _without_tokenizer(data)})}")
    return changed


def _without_tokenizer(data: Any) -> Any:
    """What a configuration says of data, less the tokenizer; the name of a class alone has no arguments."""
    if not isinstance(data, dict) or not isinstance(arguments := data.get("init_args"), dict):
        return data
    return {**data, "init_args": {key: value for key, value in arguments.items() if key != "tokenizer"}}


def _fields_of(path: Path) -> dict[str, Any]:
    """The top-level keys of a YAML file; none where it is none, which jsonargparse tells."""
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return fields if isinstance(fields, dict) else {}
