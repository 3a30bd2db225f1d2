"""The command line: `main` for Python, `console` for the shell. Heavy packages are loaded in use."""

from lowrank_pl.cli.entry import console, main

__all__ = ["console", "main"]
