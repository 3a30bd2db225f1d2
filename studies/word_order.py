r"""A task that no default was chosen on: is the order of the words right?

Makes it from sentences of SST-2's training split: four of ten have two of their words exchanged. Short texts, two
unequal classes, scored by Matthews' correlation, and nothing that a bag of words could tell: what is lost when
attention is damaged shows here first.

    python studies/word_order.py --glue PATH/TO/glue --output word_order
    python studies/grid.py --glue PATH/TO/glue --tasks word_order/data.yaml --one_round RankDyna:0.33

Writes train.csv, dev.csv and data.yaml; the same from the same sentences.
"""

from __future__ import annotations

import argparse
import csv
import random
from collections.abc import Sequence
from pathlib import Path

import yaml
from options import OPTIONS

SHARE = 0.4
"""Of sentences that are put out of order."""
DISTANCE = 4
"""At most, between two words that are exchanged."""


def sentences(path: Path, words: range) -> list[str]:
    """Those of a TSV file that have so many words; each once, none a part of one before it."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        found = sorted({row["sentence"].strip() for row in rows}, key=lambda text: (-len(text), text))
    kept: list[str] = []
    seen: set[str] = set()
    for text in found:
        split = text.split()
        if len(split) in words and text not in seen:
            kept.append(text)
            seen.update(" ".join(split[i:j]) for i in range(len(split)) for j in range(i + words.start, len(split) + 1))
    return sorted(kept)


def out_of_order(text: str, chance: random.Random) -> str:
    """The same words with two of them exchanged, so that the text is another one."""
    words = text.split()
    while True:
        first = chance.randrange(len(words) - 1)
        second = min(first + chance.randint(1, DISTANCE), len(words) - 1)
        if words[first] != words[second]:
            words[first], words[second] = words[second], words[first]
            return " ".join(words)


def labelled(texts: Sequence[str], chance: random.Random) -> list[tuple[str, str]]:
    """Texts with `ok` or `odd`."""
    odd = [chance.random() < SHARE and len(set(text.split())) > 1 for text in texts]
    return [(out_of_order(t, chance), "odd") if o else (t, "ok") for t, o in zip(texts, odd, strict=True)]


def main() -> None:
    """Writes the task."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--glue", **OPTIONS["glue"])
    options.add_argument("--output", type=Path, default=Path("word_order"), help="a new folder")
    options.add_argument("--samples", type=int, nargs=2, default=[6800, 1100], help="of training and development")
    arguments = options.parse_args()
    found = sentences(Path(arguments.glue) / "SST-2" / "train.tsv", range(5, 16))
    chance = random.Random(0)
    chance.shuffle(found)
    if len(found) < sum(arguments.samples):
        options.error(f"--samples {arguments.samples}: SST-2 has {len(found)} sentences of 5 to 15 words")
    arguments.output.mkdir(parents=True)
    init: dict[str, object] = {"text": "sentence", "label": "label", "metrics": ["matthews"]}
    for split, name, count in zip(("train", "validation"), ("train", "dev"), arguments.samples, strict=True):
        path = arguments.output / f"{name}.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("sentence", "label"), *labelled(found[:count], chance)])
        del found[:count]
        init[split] = str(path.resolve())
    told = {"data": {"class_path": "TextFiles", "init_args": init}}
    (arguments.output / "data.yaml").write_text(yaml.safe_dump(told), encoding="utf-8")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
