"""Makes a multiple-choice task for the verb `evaluate` out of a text file: which of four endings does a line have?

    python studies/multiple_choice.py --text test.txt --output task --questions 100
    python -m lowrank_pl evaluate --models MODEL --tasks which_ending --include_path task --output scores

A question shows the first words of a line; the endings are the words that follow there and, as often as there are wrong
ones, those at the same place of other lines. So it asks for the thread of a text, not for knowledge, and needs no
network. The folder gets questions.jsonl and which_ending.yaml, which names it by its whole path.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

TASK = "which_ending"
_YAML = """task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
output_type: multiple_choice
test_split: test
fewshot_split: test # named, so that a question is never among its own examples
doc_to_text: context
doc_to_choice: endings
doc_to_target: answer
metric_list: # acc: by log-likelihood; acc_norm: by log-likelihood per byte of the ending
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def make_questions(text: str, count: int, shown: int, asked: int, choices: int, seed: int) -> list[dict[str, Any]]:
    """Questions out of the lines that are long enough, each line once at most.

    Args:
        text: One paragraph per line.
        count: Of questions at most.
        shown: Words of a context.
        asked: Words of an ending.
        choices: Endings of a question.
        seed: Of the choice of lines, and of the place of the true ending.
    """
    starts = dict.fromkeys(tuple(line.split()[: shown + asked]) for line in text.splitlines())
    lines = [words for words in starts if len(words) == shown + asked]
    generator = random.Random(seed)
    questions = []
    for words in generator.sample(lines, min(count, len(lines))) if len(lines) >= choices else []:
        others = [line for line in lines if line[shown:] != words[shown:]]
        endings = [" ".join(line[shown:]) for line in generator.sample(others, choices - 1)]
        answer = generator.randrange(choices)
        endings.insert(answer, " ".join(words[shown:]))
        questions.append({"context": " ".join(words[:shown]), "endings": endings, "answer": answer})
    return questions


def write_task(questions: list[dict[str, Any]], folder: Path) -> None:
    """Writes questions and task file into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.absolute() / "questions.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in questions), encoding="utf-8")
    text = _YAML.format(task=TASK, questions=json.dumps(str(path)))
    (folder / f"{TASK}.yaml").write_text(text, encoding="utf-8")


def main(words: list[str] | None = None) -> None:
    """Makes the task of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="a text file, one paragraph per line")
    parser.add_argument("--output", type=Path, required=True, help="a folder that is not there yet")
    for name, default, told in (
        ("questions", 100, "at most"),
        ("shown", 24, "words of a context"),
        ("asked", 12, "words of an ending"),
        ("choices", 4, "endings of a question"),
        ("seed", 0, "of the choice"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{told} ({default})")
    given = parser.parse_args(words)
    if given.output.exists():
        sys.exit(f"--output {str(given.output)!r} exists already")
    text = given.text.read_text(encoding="utf-8")
    questions = make_questions(text, given.questions, given.shown, given.asked, given.choices, given.seed)
    if not questions:
        sys.exit(
            f"{str(given.text)!r} has too few lines of {given.shown + given.asked} words; lower --shown or --asked"
        )
    write_task(questions, given.output)
    print(f"{len(questions)} questions in {given.output}")


if __name__ == "__main__":
    main()
