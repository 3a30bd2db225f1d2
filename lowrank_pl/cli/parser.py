"""The parser of every verb: a typing error ends in a sentence, not in all options."""

from __future__ import annotations

import re
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from lowrank_pl.cli.complaint import shortened
from lowrank_pl.cli.entry import debugging

_NONE = re.compile(r"(?<==)None$")


class Parser(LightningArgumentParser):
    """Lightning's parser with short messages; options have to be written out."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # An abbreviation means something else once another option begins with the same letters.
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def parse_args(  # type: ignore[override]  # argparse's overloads know no options of jsonargparse
        self, args: Sequence[str] | None = None, *rest: Any, **options: Any
    ) -> Namespace:
        """As jsonargparse does, with `null` at any depth.

        A value of a class inside a class is handed on as text, and Python's text of a null is no null of YAML.
        """
        known = args if args is None else [_NONE.sub("null", arg) for arg in args]
        return super().parse_args(known, *rest, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Says what is wrong, what was probably meant and where to look, and exits with code 2."""
        if not self.exit_on_error or debugging():
            super().error(message, ex)
        parser = self._of_the_verb(message)
        options = [option for action in parser._actions for option in action.option_strings]
        sys.stderr.write(f"{parser.prog}: {shortened(message, options)}\nSee `{parser.prog} --help`.\n")
        sys.exit(2)

    def _of_the_verb(self, message: str) -> ArgumentParser:
        """The parser of the verb that a message of the main parser is about."""
        named = re.match(r"Subcommand '(\w+)'|the following arguments are required: (\w+)\.", message)
        verbs = getattr(getattr(self, "_subcommands_action", None), "choices", None) or {}
        found: ArgumentParser = verbs.get(named[1] or named[2], self) if named else self
        return found
