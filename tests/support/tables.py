"""Small files in the formats the data modules read."""

from __future__ import annotations

import random
from pathlib import Path

_GOOD = ["a good film", "great plot", "the great and good film", "it is great"]
_BAD = ["a bad film", "awful plot", "the awful and bad film", "it is awful"]


def write_sst2(folder: Path, rows: int = 48) -> Path:
    """SST-2 in the official layout, learnable; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", rows), ("dev", rows // 3)):
        chance = random.Random(split)
        lines = ["sentence\tlabel"]
        for index in range(count):
            label = index % 2
            lines.append(f"{chance.choice(_GOOD if label else _BAD)} {chance.choice('abcdefgh')}\t{label}")
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    (folder / "test.tsv").write_text("index\tsentence\n0\ta good plot\n1\tan awful film\n")
    return folder
