"""The command that has started this program, as it can be given again."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path


def command_line() -> str:
    """For reports: `lowrank-pl fit …`, `python -m lowrank_pl fit …`, or the name of a script and its arguments."""
    program = Path(sys.argv[0])
    name = [program.name] if program.name != "__main__.py" else ["python", "-m", program.parent.name]
    return shlex.join([*name, *sys.argv[1:]])
