"""Which error of a chain a user reads."""

from __future__ import annotations

import pytest

from lowrank_pl.cli.commands import _own_error
from lowrank_pl.errors.base import LowRankError


class InnerError(LowRankError):
    """Says what happened."""


class OuterError(LowRankError):
    """Says it in the words of the command."""


def fail(whole: bool) -> None:
    try:
        try:
            raise InnerError("inner")
        except InnerError as error:
            if whole:
                raise OuterError("outer") from None
            raise OuterError("outer") from error
    except OuterError as error:
        raise RuntimeError("of a library") from error


@pytest.mark.parametrize(("whole", "told"), [(True, OuterError), (False, InnerError)])
def test_the_innermost_error_is_told_unless_another_says_it_all(whole: bool, told: type[LowRankError]) -> None:
    with pytest.raises(RuntimeError) as caught:
        fail(whole)
    assert type(_own_error(caught.value)) is told


def test_errors_of_others_are_not_ours() -> None:
    assert _own_error(ValueError("x")) is None
