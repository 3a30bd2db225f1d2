"""The command that reports tell."""

from __future__ import annotations

import sys

import pytest

from lowrank_pl.files.command import command_line


def test_the_command_can_be_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for program, told in (("/x/lowrank_pl/__main__.py", "python -m lowrank_pl"), ("/bin/lowrank-pl", "lowrank-pl")):
        monkeypatch.setattr(sys, "argv", [program, "fit", "--a=b c"])
        assert command_line() == f"{told} fit '--a=b c'"
