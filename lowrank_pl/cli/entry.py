"""How the command line starts and how it ends: exit codes, and one line for what a user can mend.

Light on purpose: the packages that take seconds to import are loaded inside, where an interrupt ends as it should, and
not at all for `--help` and `--version`.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import Any

from lowrank_pl import __version__
from lowrank_pl.cli.verbs import PROGRAM, VERBS, overview, unknown_verb
from lowrank_pl.errors import LowRankError

DEBUG = "LOWRANK_PL_DEBUG"
_INTERRUPTED = 130  # 128 + SIGINT, what a shell reports


def main(args: list[str] | dict[str, Any] | None = None) -> None:
    """Runs the command line.

    Args:
        args: Arguments instead of `sys.argv[1:]`, e.g. `["fit", "--config", "run.yaml"]`.

    Raises:
        LowRankError: bad input, of one of its subclasses.
        SystemExit: with code 2, words that cannot be parsed: what is wrong is on the error stream; with 0, `--help`
            and the like.
    """
    words = sys.argv[1:] if args is None else args
    if isinstance(words, list):
        _answer(words)
    from lowrank_pl.cli.commands import run

    run(args)


def _answer(words: list[str]) -> None:
    """Ends what needs no verb: help, version, and a first word that is none."""
    if not words:
        print(overview(), file=sys.stderr)
        sys.exit(2)
    if words[0] in ("-h", "--help", "--version"):
        print(f"{PROGRAM} {__version__}" if words[0] == "--version" else overview())
        sys.exit(0)
    if not words[0].startswith("-") and words[0] not in VERBS:
        print(unknown_verb(words[0]), file=sys.stderr)
        sys.exit(2)


def console() -> None:
    """`main` for the shell.

    What a user can mend ends in one line `ErrorName: message` and exit code 1, an interrupt in one line and 130, and
    SIGTERM in one line and 143 once a run has begun; before, it ends the program at once. A bug keeps its traceback.
    The environment variable `LOWRANK_PL_DEBUG=1` shows every traceback.
    """
    try:
        if sys.argv[1:] and sys.argv[1] in VERBS:
            _load()
        main()
    except KeyboardInterrupt:
        if debugging():
            raise
        # That of a run is a RunStoppedError by now; this is an interrupt before or after it.
        print("interrupted", file=sys.stderr)
        sys.exit(_INTERRUPTED)
    except Exception as error:
        if debugging() or not _of_the_user(error):
            raise
        line = f"{type(error).__name__}: {' '.join(str(error).split())}"
        code = getattr(error, "code", None)
        if isinstance(error, LowRankError) and isinstance(code, int):
            print(line, file=sys.stderr)
            sys.exit(code)
        sys.exit(line)


def _load() -> None:
    """Imports what takes seconds; an interrupt ends it at once, because some packages make another error of one."""
    if debugging():
        return
    before = signal.signal(signal.SIGINT, _leave)
    try:
        importlib.import_module("lowrank_pl.cli.commands")
    finally:
        signal.signal(signal.SIGINT, before)


def _leave(*_: object) -> None:
    os.write(2, b"interrupted\n")
    os._exit(_INTERRUPTED)


def debugging() -> bool:
    """Whether tracebacks are wanted."""
    return os.environ.get(DEBUG, "") not in ("", "0")


def _of_the_user(error: Exception) -> bool:
    """Whether an error is about bad input or the surroundings, and not about a bug."""
    if isinstance(error, (LowRankError, OSError)):
        return True
    # If nothing has loaded Lightning, the error is none of its.
    exceptions = sys.modules.get("lightning.fabric.utilities.exceptions")
    return exceptions is not None and isinstance(error, exceptions.MisconfigurationException)
