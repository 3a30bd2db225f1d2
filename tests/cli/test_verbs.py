"""The verbs that the help tells of are those that there are."""

from __future__ import annotations

from typing import Any

import pytest

from lowrank_pl.cli import main
from lowrank_pl.cli.commands import LowRankCLI
from lowrank_pl.cli.functions import FUNCTIONS
from lowrank_pl.cli.verbs import VERBS, overview, unknown_verb


def test_every_verb_is_told_of() -> None:
    assert set(VERBS) == {*LowRankCLI.subcommands(), *FUNCTIONS}
    assert all(f"\n  {verb} " in overview() for verb in VERBS)


def test_a_mistyped_verb() -> None:
    assert "Did you mean 'fit'?" in unknown_verb("fti")
    assert "Did you mean 'benchmark'?" in unknown_verb("benchmrk")
    assert "Did you mean" not in unknown_verb("qqqq")


@pytest.mark.parametrize(("words", "verbs"), [(["fit", "--help"], 1), (["-c", "nowhere.yaml"], 7)])
def test_only_the_verb_that_was_typed_gets_its_options(
    words: list[str], verbs: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []
    add = LowRankCLI._add_arguments

    def counted(cli: LowRankCLI, parser: Any) -> None:
        calls.append(1)
        add(cli, parser)

    monkeypatch.setattr(LowRankCLI, "_add_arguments", counted)
    with pytest.raises(SystemExit):
        main(words)
    assert len(calls) == verbs
