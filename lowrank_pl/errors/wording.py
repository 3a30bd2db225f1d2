"""Phrases that several messages have in common."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


def listed(values: Iterable[object], limit: int = 12) -> str:
    """Quotes values, and cuts lists that are longer than the limit."""
    quoted = [repr(value) for value in values]
    more = f", … ({len(quoted)} in all)" if len(quoted) > limit else ""
    return ", ".join(quoted[:limit]) + more


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """A question after the value that comes closest, or nothing where none is close."""
    lowered = {value.lower(): value for value in allowed}
    close = get_close_matches(given.lower(), list(lowered), n=1, cutoff=0.6)
    return f" Did you mean {lowered[close[0]]!r}?" if close else ""


def place(path: str | Path, line: int) -> str:
    """A line of a file, from 1, as editors and terminals know it."""
    return f"{path}:{line}"
