"""Small data files in the formats of the datamodules."""

from __future__ import annotations

import random
from pathlib import Path

_WORDS = ["the", "of", "and", "to", "is", "that", "it", "was", "good", "bad", "film", "great", "awful", "plot"]


def sentence(rng: random.Random, least: int = 3, most: int = 20) -> str:
    """A sentence of words that the tiny tokenizer knows."""
    return " ".join(rng.choice(_WORDS) for _ in range(rng.randint(least, most)))


def write(path: Path, content: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode(encoding))
    return path


def write_tsv(path: Path, header: list[str] | None, rows: list[list[str]]) -> Path:
    lines = ["\t".join(row) for row in ([header] if header else []) + rows]
    return write(path, "\n".join(lines) + "\n")


def write_sst2(folder: Path, train: int = 37, validation: int = 11, test: int = 5, seed: int = 0) -> Path:
    """The official layout of SST-2; sentences are distinct."""
    rng = random.Random(seed)

    def rows(size: int) -> list[list[str]]:
        return [[f"{sentence(rng)} {seed} {at}", str(at % 2)] for at in range(size)]

    write_tsv(folder / "train.tsv", ["sentence", "label"], rows(train))
    write_tsv(folder / "dev.tsv", ["sentence", "label"], rows(validation))
    write_tsv(folder / "test.tsv", ["index", "sentence"], [[str(at), sentence(rng)] for at in range(test)])
    return folder


def module(docstrings: dict[str, str]) -> str:
    """A Python module that documents functions and cannot be imported."""
    return "raise RuntimeError('must not be imported')\n" + "".join(
        f'def {name}():\n    """{text}"""\n' for name, text in docstrings.items()
    )


def big_package(folder: Path, name: str, size: int) -> None:
    """A package of many functions, each with another docstring."""
    rng = random.Random(name)
    docstrings = {f"function_{at}": f"{sentence(rng, 5, 12)} {at} {name[0]}." for at in range(size)}
    write(folder / name / "__init__.py", module(docstrings))
