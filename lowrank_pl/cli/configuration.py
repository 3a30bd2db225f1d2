"""What is looked at in a parsed configuration before anything is made of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from lowrank_pl.errors.arguments import InterpolationError

_VARIABLE = re.compile(r"\$\{[^}]*\}")
_NEEDS_LOGGER = ("LearningRateMonitor", "DeviceStatsMonitor")
_PARTS = ("model", "data", "ckpt_path", "output")  # the trainer's loggers expand variables in their folders themselves


def refuse_interpolation(config: Any) -> None:
    """Raises an error for `${…}`, which YAML does not fill in and which would be looked for as a name.

    Args:
        config: Of one verb, as parsed.

    Raises:
        InterpolationError: a value of the model, the data or a path contains it.
    """
    for part in _PARTS:
        for key, value in _strings(config.get(part), part):
            if found := _VARIABLE.search(value):
                raise InterpolationError(key, value, found[0])


def _strings(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Every string of a nested configuration with its dotted key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _strings(item, f"{key}[{index}]")
    elif value is not None and hasattr(value, "items"):
        for name, item in value.items():
            yield from _strings(item, f"{key}.{name}")


def without_needless_monitors(trainer: Any) -> list[str]:
    """Takes out callbacks that only write to a logger: Lightning refuses them in a trainer without one.

    The recipes list such a callback, and `--trainer.logger false` is the usual way to run without files.

    Args:
        trainer: The configuration of a trainer without a logger, changed in place.

    Returns:
        Names of the classes that were taken out.
    """
    callbacks = trainer.get("callbacks")
    if not isinstance(callbacks, list):
        return []
    names = [str(callback.get("class_path", "")).rpartition(".")[2] for callback in callbacks]
    trainer["callbacks"] = [c for c, name in zip(callbacks, names, strict=True) if name not in _NEEDS_LOGGER]
    return [name for name in names if name in _NEEDS_LOGGER]
