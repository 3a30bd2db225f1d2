"""Labels as files spell them, and the classes that they stand for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from lowrank_pl.data.raw import LabelledText, class_ids

_WHOLE = re.compile(r"(-?\d+)\.0+")


def spelled(value: object) -> str | None:
    """A label as text; `None` where there is none: a null, or the NaN that tables use for it."""
    if value is None or value != value:
        return None
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def is_compound(value: object) -> bool:
    """Whether a value holds several, or bytes: nothing that a single label could be."""
    return isinstance(value, (list, dict, bytes))


def class_names(labels: Iterable[str | None]) -> list[str]:
    """The classes of a training split: its labels, sorted, whole numbers by their size.

    Labels that are the same whole number are one class, called as it is spelled first.
    """
    found: dict[str, str] = {}
    for label in labels:
        if label:
            found.setdefault(_same(label), label)
    names = list(found.values())
    return sorted(names, key=int) if all(map(_is_integer, names)) else sorted(names)


def ids_by_class(part: LabelledText, names: Sequence[str], may_be_ids: bool) -> list[int]:
    """The class id of every row.

    Whole numbers are the same in every spelling: one format writes 1 where another has 1.0.

    Args:
        part: A labelled split.
        names: Classes in the order of their ids.
        may_be_ids: Whether labels may be ids instead; they never may be where a name is a number.

    Raises:
        UnknownLabelError: a label that is no class.
    """
    assert part.labels is not None
    by_id = may_be_ids and not any(map(_is_number, names))
    known: Mapping[str, int] = {str(id_): id_ for id_ in range(len(names))} if by_id else {}
    known = {**known, **{_same(name): id_ for id_, name in enumerate(names)}}
    found = {str(label) for label in part.labels if label is not None}
    return class_ids(part, {label: known[_same(label)] for label in found if _same(label) in known}, names)


def _same(label: str) -> str:
    """One spelling of a whole number; any other label as it is."""
    whole = _WHOLE.fullmatch(label)
    return whole[1] if whole else label


def _is_integer(label: str) -> bool:
    return label.removeprefix("-").isdecimal()


def _is_number(label: str) -> bool:
    try:
        float(label)
    except ValueError:
        return False
    return True
