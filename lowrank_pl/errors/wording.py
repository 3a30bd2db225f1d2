"""Phrases that several messages have in common."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

_SHOWN = 12


def listed(values: Iterable[object]) -> str:
    """Quotes values, and cuts long lists."""
    quoted = [repr(value) for value in values]
    more = f", … ({len(quoted)} in all)" if len(quoted) > _SHOWN else ""
    return ", ".join(quoted[:_SHOWN]) + more


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """A question after the value that comes closest, or nothing where none is close."""
    lowered = {value.lower(): value for value in allowed}
    close = get_close_matches(given.lower(), list(lowered), n=1, cutoff=0.6)
    return f" Did you mean {lowered[close[0]]!r}?" if close else ""


def place(path: str | Path, line: int) -> str:
    """A line of a file, from 1, as editors and terminals know it."""
    return f"{path}:{line}"
