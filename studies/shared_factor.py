r"""Would layers with one input, as query, key and value, do with one right factor for all of them?

A stack of weights `[W_q; W_k; W_v]` in two factors has one `[r, n]` for `n` inputs, and ranks about half as high again
for the same parameters. Of every group of layers that get the same input, the loss that its lost energies stand for is
compared: each layer by itself, at the ranks of `Global`, against the stack at what these cost, from one decomposition
in the same metric (`kronecker_groups`). Above 1 the shared factor is the worse one.

    python studies/shared_factor.py --model RUN/checkpoints/last.ckpt --task MRPC --glue PATH/TO/glue
    python studies/shared_factor.py --model DECODER/FOLDER --text PATH/TO/text.txt --samples 16

Writes shared_factor.json and shared_factor.md.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from options import OPTIONS, glue, parser, read
from tables import header, line, write
from torch import Tensor, nn

from lowrank_pl.allocation import Allocation, Global, RankRequest
from lowrank_pl.core import LinearShape, kronecker_groups
from lowrank_pl.data import GLUE, CausalText
from lowrank_pl.importance import LayerMoments, SecondMoments
from lowrank_pl.nn import dense_weight
from lowrank_pl.surgery import TargetSelector
from lowrank_pl.tasks import CausalLM, SequenceClassification


def inputs_in_common(moments: Mapping[str, LayerMoments]) -> list[list[str]]:
    """Layers of one parent with one moment of inputs, up to the few tokens that one of them may see alone."""
    found: list[list[str]] = []
    for name, layer in moments.items():
        for group in found:
            siblings = group[0].rpartition(".")[0] == name.rpartition(".")[0]
            if siblings and _close(layer.inputs, moments[group[0]].inputs):
                group.append(name)
                break
        else:
            found.append([name])
    return [group for group in found if len(group) > 1]


def _close(one: Tensor | None, other: Tensor | None) -> bool:
    assert one is not None
    assert other is not None
    return one.shape == other.shape and float((one - other).norm() / other.norm()) < 0.05


def energies_of_stack(weights: list[Tensor], moments: list[LayerMoments]) -> Tensor:
    """Of the stacked weights, as if the gradients at different layers were independent, as K-FAC takes them."""
    inputs = torch.stack([layer.inputs for layer in moments if layer.inputs is not None]).mean(0)
    outputs = torch.block_diag(*(layer.outputs for layer in moments if layer.outputs is not None))
    return kronecker_groups(torch.cat(weights), inputs, outputs).energies


def lost(energies: Tensor, rank: int | None) -> float:
    """Energy of the groups that a rank leaves out; none of a dense layer."""
    return 0.0 if rank is None else float(energies[rank:].sum())


def compare(
    group: list[str], allocation: Allocation, energies: Mapping[str, Tensor], stack: Tensor
) -> dict[str, Any] | None:
    """One group at the ranks of an allocation; `None` where it is dense, or its stack could be."""
    shapes, ranks = [allocation.shapes[name] for name in group], [allocation.ranks[name] for name in group]
    apart = sum(lost(energies[name], rank) for name, rank in zip(group, ranks, strict=True))
    cost = sum(s.dense_params if r is None else s.factored_params(r) for s, r in zip(shapes, ranks, strict=True))
    whole = LinearShape(sum(s.out_features for s in shapes), shapes[0].in_features)
    if apart == 0 or cost >= whole.dense_params:
        return None
    rank = cost // whole.factored_params(1)
    told = {"layers": group, "ranks": ranks, "shared_rank": rank}
    return {**told, "ratio": lost(stack, rank) / apart}


def main() -> None:
    """Measures and writes."""
    options = parser(__doc__, "model", "task", "pretrained", max_train_samples=[], output=Path("logs/shared_factor"))
    options.add_argument("--glue", help=OPTIONS["glue"]["help"])
    options.add_argument("--text", help="a text file, for a decoder, instead of --glue")
    options.add_argument("--samples", type=int, default=1024, help="calibration samples, or windows of 512 tokens")
    options.add_argument("--ratios", nargs="+", type=float, default=[0.5, 0.33, 0.2, 0.1], help="keep_ratios")
    arguments = read(options)
    if (arguments.glue is None) == (arguments.text is None):
        options.error("give one of --glue and --text")
    task: SequenceClassification | CausalLM
    data: GLUE | CausalText
    if arguments.text is None:
        task, data = SequenceClassification(init_from=arguments.model), glue(arguments.task, arguments)
    else:
        task, data = CausalLM(pretrained=arguments.model), CausalText(arguments.model, train=arguments.text)
    task.build()
    data.prepare_data()
    data.setup("fit" if arguments.text is None else None)
    layers = TargetSelector().select(task.encoder)
    lines, told = header("keep_ratio", "groups", "lowest", "median", "highest"), []
    batches = data.calibration_batches(8, arguments.samples, 0, 0, 1)
    moments = SecondMoments().measure(task.encoder, layers, batches, task.per_sample_losses, None, arguments.samples)
    for ratio, rows in study(layers, moments.layers, arguments.ratios).items():
        ratios = [row["ratio"] for row in rows]
        cells = (min(ratios), statistics.median(ratios), max(ratios)) if rows else ()
        lines.append(line(ratio, len(rows), *(f"{cell:.2f}" for cell in cells)))
        told += [{"keep_ratio": ratio, **row} for row in rows]
    write(arguments.output, "shared_factor", lines, told)
    print("\n".join(lines))


def study(
    layers: Mapping[str, nn.Module], moments: Mapping[str, LayerMoments], ratios: list[float]
) -> dict[float, list[dict[str, Any]]]:
    """All groups at all ratios."""
    weights = {name: dense_weight(layer).detach() for name, layer in layers.items()}
    energies = {n: kronecker_groups(w, moments[n].inputs, moments[n].outputs).energies for n, w in weights.items()}
    groups = inputs_in_common(moments)
    stacks = [energies_of_stack([weights[n] for n in group], [moments[n] for n in group]) for group in groups]
    shapes = {name: LinearShape(*weight.shape) for name, weight in weights.items()}
    found: dict[float, list[dict[str, Any]]] = {}
    for ratio in ratios:
        allocation = Global().allocate(RankRequest(shapes, keep_ratio=ratio), energies)
        rows = [compare(g, allocation, energies, stack) for g, stack in zip(groups, stacks, strict=True)]
        found[ratio] = [row for row in rows if row is not None]
    return found


if __name__ == "__main__":
    main()
