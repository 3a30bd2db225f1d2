r"""Scores what may stand in for an encoder: a table of token embeddings, their mean, and a linear head.

    pip install --no-deps --target PACKAGES wordllama==0.4.0.post1
    python studies/static_embeddings.py --glue PATH/TO/glue --packages PACKAGES --tasks MRPC STS-B SST-2 \
        configs/data/docstrings.yaml

The table is that of the package wordllama (MIT): 32,000 tokens, 256 numbers each, of which the first 64 are a model as
well. Means are scaled to length 1. Of a pair of texts the head gets both means, their absolute difference and their
product. Tuned is the head alone, or the table with it, at each of --rates; the rate with the best score on the
development set is shown, which favours it. Files: the table in float16 as it is delivered, or with eight bits and a
scale per token, and the head in float32.
Writes static_embeddings.md and static_embeddings.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from options import glue, parser, read
from safetensors.torch import load_file
from tables import describe, header, line, write
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

import lowrank_pl.data
from lowrank_pl.contract import TargetSpec, choose
from lowrank_pl.data import TextDataModule
from lowrank_pl.tasks.metrics import build_metrics, score

WIDTHS = (256, 64)


class Texts:
    """Tokens of all texts of a split, one text after the other; of pairs, those of both sides."""

    def __init__(self, rows: Any, tokenizer: Tokenizer) -> None:
        columns = [name for name in ("text", "text_pair") if name in rows.column_names]
        # Without the token that begins a text: it says nothing, and its embedding is twice as long as others.
        encoded = [tokenizer.encode_batch(list(rows[name]), add_special_tokens=False) for name in columns]
        self.sides = [[torch.tensor(text.ids, dtype=torch.long) for text in side] for side in encoded]
        self.labels = torch.tensor(rows["labels"])

    def batches(self, size: int, order: Tensor | None = None) -> Iterator[tuple[list[tuple[Tensor, Tensor]], Tensor]]:
        """Per side the tokens and where each text begins, and the labels `[b]`."""
        order = torch.arange(len(self.labels)) if order is None else order
        for part in order.split(size):
            yield [_joined([side[i] for i in part.tolist()]) for side in self.sides], self.labels[part]


def _joined(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([0, *(len(text) for text in texts[:-1])])
    return torch.cat(list(texts)), lengths.cumsum(0)


class StaticModel(nn.Module):
    """Means of token embeddings, of length 1, and a linear head.

    Args:
        table: Embeddings `[v, d]`.
        sides: Texts per sample.
        outputs: Classes, or 1 for a value.
    """

    def __init__(self, table: Tensor, sides: int, outputs: int) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag.from_pretrained(table.clone(), freeze=False, mode="mean")
        self.head = nn.Linear(table.shape[1] * (1 if sides == 1 else 4), outputs)

    def forward(self, sides: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Logits `[b, c]` or values `[b]`."""
        means = [F.normalize(self.table(tokens, starts), dim=-1) for tokens, starts in sides]
        if len(means) == 2:
            means += [(means[0] - means[1]).abs(), means[0] * means[1]]
        found: Tensor = self.head(torch.cat(means, -1))
        return found.squeeze(-1) if found.shape[-1] == 1 else found


def train(model: StaticModel, texts: Texts, rate: float, epochs: int, table: bool) -> None:
    """AdamW at a falling rate, of the head ten times that of the table; with or without the table."""
    model.table.weight.requires_grad_(table)
    groups: list[dict[str, Any]] = [{"params": model.head.parameters(), "lr": 10 * rate}]
    groups += [{"params": [model.table.weight], "lr": rate}] if table else []
    optimizer = torch.optim.AdamW(groups, fused=True)
    steps = epochs * -(-len(texts.labels) // 64)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(epochs):
        for sides, labels in texts.batches(64, torch.randperm(len(texts.labels))):
            logits = model(sides)
            loss = F.mse_loss(logits, labels.float()) if logits.ndim == 1 else F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            falling.step()


@torch.no_grad()
def scored(model: StaticModel, texts: Texts, target: TargetSpec) -> dict[str, float]:
    """The task's metrics on a split, and its score."""
    metrics = build_metrics(target)
    for sides, labels in texts.batches(256):
        metrics.update(model(sides), labels)
    found = metrics.compute()
    return {name: float(value) for name, value in found.items()} | {"score": float(score(target, found))}


@torch.no_grad()
def in_eight_bits(model: StaticModel) -> None:
    """Rounds the table to whole numbers of eight bits, with a scale per token."""
    weight = model.table.weight
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    weight.copy_((weight / scale).round() * scale)


@dataclass(frozen=True)
class Found:
    """Metrics of one model on one task, as delivered and in eight bits, and the size of its files in MB."""

    task: str
    width: int
    tuned: str
    rate: float
    metrics: dict[str, float]
    metrics_int8: dict[str, float]
    megabytes: float
    megabytes_int8: float


def data_of(task: str, arguments: argparse.Namespace) -> TextDataModule:
    """The data of a GLUE task, or of a YAML file with a `data` section, not read yet."""
    if not task.endswith(".yaml"):
        return glue(task, arguments)
    told = yaml.safe_load(Path(task).read_text(encoding="utf-8"))["data"]
    kind = getattr(lowrank_pl.data, told["class_path"].rpartition(".")[2])
    made: TextDataModule = kind(arguments.pretrained, **told["init_args"])
    return made


def study(task: str, table: Tensor, tokenizer: Tokenizer, arguments: argparse.Namespace) -> Iterator[Found]:
    """All models of one task."""
    data = data_of(task, arguments)
    raw = data.read()
    target, train_rows = raw.target, raw.splits["train"]
    assert target is not None  # of a labelled training split
    # Those that encoders are tuned on.
    train_rows = train_rows.select(choose(len(train_rows), data.max_train_samples, data.seed))
    texts, development = Texts(train_rows, tokenizer), Texts(raw.splits["validation"], tokenizer)
    outputs = max(1, len(target.label_names))
    for width in WIDTHS:
        for tuned in ("head", "table and head"):
            best: Found | None = None
            for rate in arguments.rates:
                torch.manual_seed(0)
                model = StaticModel(table[:, :width].float(), len(texts.sides), outputs)
                train(model, texts, rate, int(arguments.epochs), tuned != "head")
                own = scored(model, development, target)
                in_eight_bits(model)
                numbers, head = model.table.weight.numel(), 4 * sum(p.numel() for p in model.head.parameters())
                sizes = [(2 * numbers + head) / 1e6, (numbers + 2 * len(table) + head) / 1e6]
                found = Found(
                    Path(task).stem, width, tuned, rate, own, scored(model, development, target), sizes[0], sizes[1]
                )
                best = found if best is None or found.metrics["score"] > best.metrics["score"] else best
            assert best is not None
            print(best, flush=True)
            yield best


def main() -> None:
    """Trains and scores all models, and writes the table."""
    options = parser(
        __doc__,
        "glue",
        "max_train_samples",
        "pretrained",
        tasks=["MRPC", "STS-B", "SST-2"],
        epochs="10",
        output=Path("logs/static_embeddings"),
    )
    options.add_argument("--packages", type=Path, required=True, help="where wordllama is installed")
    options.add_argument("--rates", type=float, nargs="+", default=[1e-4, 1e-3, 5e-3], help="of the table")
    arguments = read(options)
    package = arguments.packages / "wordllama"
    (table,) = load_file(package / "weights" / "l2_supercat_256.safetensors").values()
    tokenizer = Tokenizer.from_file(str(package / "tokenizers" / "l2_supercat_tokenizer_config.json"))
    tokenizer.no_padding()
    found = [each for task in arguments.tasks for each in study(task, table, tokenizer, arguments)]
    lines = header("task", "width", "tuned", "rate", "float16", "MB", "int8", "MB")
    lines += [
        line(
            each.task,
            each.width,
            each.tuned,
            each.rate,
            describe({"metrics": each.metrics}),
            f"{each.megabytes:.1f}",
            describe({"metrics": each.metrics_int8}),
            f"{each.megabytes_int8:.1f}",
        )
        for each in found
    ]
    write(arguments.output, "static_embeddings", lines, [vars(each) for each in found])
    print("\n".join(lines))


if __name__ == "__main__":
    main()
