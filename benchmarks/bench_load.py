"""How long an exported model takes to load in a fresh process, against the dense model by transformers.

    python benchmarks/bench_load.py --factorised EXPORTED --dense EXPORTED_DENSE --json load.json

Every load is a process of its own, in turn; imports are done before the clock runs, so that what is compared is reading
and building. `remote` is AutoModel with the code of the folder. Run it with nothing else running.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys, time
import torch, transformers
from transformers import AutoModelForSequenceClassification
from lowrank_pl import from_pretrained
way, folder = sys.argv[1:]
begin = time.perf_counter()
if way == "dense":
    model = AutoModelForSequenceClassification.from_pretrained(folder)
elif way == "remote":
    model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
else:
    model = from_pretrained(folder)
seconds = time.perf_counter() - begin
assert all(parameter.isfinite().all() for parameter in model.parameters())
print(seconds)
"""


def main() -> None:
    """Loads in turn and prints medians of ratios within a round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factorised", required=True, help="an exported folder of a sequence classifier")
    parser.add_argument("--dense", required=True, help="the same model exported with --format dense")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    ways = {"dense": arguments.dense, "own": arguments.factorised, "remote": arguments.factorised}
    rounds: list[dict[str, float]] = []
    for _ in range(arguments.rounds):
        found = {}
        for way, folder in ways.items():
            command = [sys.executable, "-c", PROGRAM, way, folder]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[way] = float(output.splitlines()[-1])
        rounds.append(found)
        print({way: round(seconds, 3) for way, seconds in found.items()}, flush=True)
    figures = {f"{way}_over_dense": statistics.median(r[way] / r["dense"] for r in rounds) for way in ("own", "remote")}
    figures |= {f"{way}_seconds": statistics.median(r[way] for r in rounds) for way in ways}
    print(json.dumps(figures, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps({**figures, "rounds": rounds}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
