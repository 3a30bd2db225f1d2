"""Which signal has stopped a run, told from the exception that Lightning makes of it."""

from __future__ import annotations

import signal

from lightning.pytorch.utilities.exceptions import SIGTERMException


def stopping_signal(exception: BaseException | None) -> signal.Signals | None:
    """The signal behind an exception.

    Args:
        exception: What a callback gets in `on_exception`, or what Lightning has raised of it: it leaves a run by
            `SystemExit` after SIGTERM (without a code) and after an interrupt (from the `KeyboardInterrupt`, code 1).

    Returns:
        `SIGTERM` or `SIGINT`; `None` for everything else.
    """
    if isinstance(exception, SIGTERMException):
        return signal.SIGTERM
    if isinstance(exception, SystemExit):
        exception = exception.__context__
    return signal.SIGINT if isinstance(exception, KeyboardInterrupt) else None
