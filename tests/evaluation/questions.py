"""The functions of `studies/multiple_choice.py`, which lies in no package."""

from __future__ import annotations

import runpy
from pathlib import Path

_STUDY = runpy.run_path(str(Path(__file__).parents[2] / "studies" / "multiple_choice.py"))
main, make_questions, write_task = (_STUDY[name] for name in ("main", "make_questions", "write_task"))
