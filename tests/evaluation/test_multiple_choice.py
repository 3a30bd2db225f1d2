"""`studies/multiple_choice.py`: questions out of a text, and the task file beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.evaluation.questions import main, make_questions

LINES = [f"{row} a b c {row}x {row}y" for row in range(6)]


def test_the_true_ending_is_the_one_that_follows() -> None:
    text = "\n".join([*LINES, LINES[0], "too short"])
    questions = make_questions(text, count=9, shown=4, asked=2, choices=3, seed=0)
    assert sorted(question["context"] for question in questions) == [f"{row} a b c" for row in range(6)]
    for question in questions:
        row = question["context"][0]
        assert len(set(question["endings"])) == 3
        assert question["endings"][question["answer"]] == f"{row}x {row}y"
    assert len({question["answer"] for question in questions}) > 1


def test_the_folder_is_complete_and_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(LINES), encoding="utf-8")
    words = ["--text", str(tmp_path / "text.txt"), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="too few lines of 36 words"):
        main(words)
    main([*words, "--shown", "4", "--asked", "2"])
    told = yaml.safe_load((tmp_path / "out" / "which_ending.yaml").read_text(encoding="utf-8"))
    rows = Path(told["dataset_kwargs"]["data_files"]["test"]).read_text(encoding="utf-8").splitlines()
    assert {"context", "endings", "answer"} == json.loads(rows[0]).keys()
    with pytest.raises(SystemExit, match="exists already"):
        main(words)
