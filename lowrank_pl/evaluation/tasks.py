"""Tasks of lm-evaluation-harness: found by name, read with their data, and checked before any model runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lowrank_pl.errors.arguments import MissingArgumentError
from lowrank_pl.errors.evaluation import TaskDataError, TaskUnusableError, UnknownHarnessTaskError
from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.errors.run import MissingPackagesError
from lowrank_pl.hub import first_line

_PACKAGES = ("lm_eval", "accelerate", "peft")
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


def check_packages() -> None:
    """Raises an error where the harness is not installed; imports nothing.

    Raises:
        MissingPackagesError: it is not.
    """
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise MissingPackagesError("evaluate", missing, "lm-eval")


def load_tasks(names: Sequence[str], include_path: str | None, num_fewshot: int | None) -> list[Any]:
    """Tasks and groups of the harness with their data.

    Args:
        names: Of tasks, groups or tags.
        include_path: A folder with task files; a name that one of them has is not looked up elsewhere.
        num_fewshot: How many solved examples are to stand before a question; `None` for each task's own number.

    Returns:
        Objects that `lm_eval.simple_evaluate` takes as `tasks`, once per model.

    Raises:
        MissingArgumentError: `include_path` is no folder, or a name is that of a YAML file.
        UnknownHarnessTaskError, TaskDataError, TaskUnusableError: a task is not known, has no data, or cannot be run.
        RangeError: a task has too few examples.
    """
    manager = _manager(names, include_path)
    loaded: list[Any] = []
    for name in names:
        try:
            found = manager.load([name])
        except (OSError, ConnectionError) as error:  # what datasets raises for files and for the hub
            raise TaskDataError(name, first_line(error), _is_offline(error)) from error
        except Exception as error:  # of the harness, of a YAML file, or of the code that it names
            raise TaskUnusableError(name, f"{type(error).__name__}: {first_line(error)}") from error
        for task in found["tasks"].values():
            _check(task, num_fewshot)
        inner = {child for children in found["group_map"].values() for child in children}
        tops = {**found["groups"], **found["tasks"]}
        loaded += [top for own, top in tops.items() if own not in inner]
    return loaded


def _manager(names: Sequence[str], include_path: str | None) -> Any:
    """The harness's index: of the user's own files alone if they have all names, as that of all others takes long."""
    from lm_eval.tasks import TaskManager

    for name in names:
        if Path(name).suffix in (".yaml", ".yml"):
            remedy = f"Give --include_path {str(Path(name).parent)!r}, and to --tasks what the key 'task' in it says."
            raise MissingArgumentError(f"the task's name (what --tasks got, {name!r}, is a file's)", remedy)
    folder = None if include_path is None else Path(include_path).expanduser()
    if folder is not None and not folder.is_dir():
        raise MissingArgumentError(f"the folder {include_path!r} of --include_path", "Name one with task files.")
    if folder is not None:
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        if set(names) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=None if folder is None else str(folder))
    for name in names:
        if name not in manager.all_tasks:
            close = get_close_matches(name, manager.all_tasks, n=3)
            raise UnknownHarnessTaskError(name, close, len(manager.all_tasks), include_path, _unread(folder))
    return manager


def _unread(folder: Path | None) -> str:
    """Of the user's own files the first that the harness passes over in silence."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for path in sorted(folder.rglob("*.yaml")) if folder else ():
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:
            return f" ({path.name} cannot be read: {first_line(error)})"
    return ""


def _is_offline(error: BaseException) -> bool:
    asked = any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in _OFFLINE)
    return asked and not isinstance(error, FileNotFoundError)


def _check(task: Any, num_fewshot: int | None) -> None:
    """Raises an error for a task that the harness would reject only after models are loaded, or not at all."""
    name = str(task.task_name)
    if getattr(task, "UNSAFE_CODE", False):
        raise TaskUnusableError(name, "it runs code that a model has written, which this command never does")
    if getattr(task, "MULTIMODAL", False):
        raise TaskUnusableError(name, "it shows pictures or sound, and decoders here read text")
    examples = getattr(getattr(task, "sampler", None), "df", None)
    own = task.get_config("num_fewshot")
    if num_fewshot and own != 0 and examples is not None:  # a task's own 0 is never overwritten by the harness
        most = len(examples) - (task.fewshot_cfg.split == task.config.test_split)
        if num_fewshot > most:
            raise RangeError("num_fewshot", num_fewshot, f"0 … {most}, the examples of task {name!r}, or null")
