"""A datamodule without files or tokenizer: random token ids whose label can be learned."""

from __future__ import annotations

from collections.abc import Iterator

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lowrank_pl.contract import TargetKind, TargetSpec
from tests.support.tiny import VOCAB

Sample = dict[str, Tensor]

_METRICS = {
    "classification": TargetSpec("synthetic", "classification", ("no", "yes"), ("f1", "accuracy"), "f1"),
    "regression": TargetSpec("synthetic", "regression", (), ("pearson", "spearman")),
    "token_classification": TargetSpec("synthetic", "token_classification", ("O", "B-X", "I-X"), ("entity_f1",)),
    "masked_lm": TargetSpec("synthetic", "masked_lm", (), ("perplexity",)),
    "causal_lm": TargetSpec("synthetic", "causal_lm", (), ("perplexity",)),
}


def _sample(kind: TargetKind, generator: torch.Generator) -> Sample:
    length = int(torch.randint(4, 12, (1,), generator=generator))
    ids = torch.randint(5, len(VOCAB), (length,), generator=generator)
    ids[0], ids[-1] = VOCAB["[CLS]"], VOCAB["[SEP]"]
    if kind == "classification":
        labels = (ids[1] > len(VOCAB) // 2).long()
    elif kind == "regression":
        labels = ids[1].float() / len(VOCAB)
    elif kind == "token_classification":
        labels = (ids > len(VOCAB) // 2).long()
        labels[0] = labels[-1] = -100
    elif kind == "causal_lm":
        labels = ids.clone()
    else:
        labels = torch.full_like(ids, -100)
        labels[1::3] = ids[1::3]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def collate(samples: list[Sample]) -> Sample:
    """Pads to the longest: ids and mask with 0, labels per token with -100."""
    padded = {}
    for key in samples[0]:
        rows = [sample[key] for sample in samples]
        if rows[0].ndim == 0:
            padded[key] = torch.stack(rows)
        else:
            fill = -100 if key == "labels" else 0
            padded[key] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
    return padded


class SyntheticBatches:
    """Calibration batches over a list of samples, sharded by rank."""

    def __init__(self, samples: list[Sample], batch_size: int, rank: int, world_size: int) -> None:
        self.num_samples = len(samples)
        self.fingerprint = f"synthetic-{len(samples)}-{batch_size}"
        mine = samples[rank::world_size]
        self._chunks = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]

    def __len__(self) -> int:
        return len(self._chunks)

    def __iter__(self) -> Iterator[Sample]:
        return (collate(chunk) for chunk in self._chunks)


class SyntheticData(pl.LightningDataModule):
    """`train` and `validation` of random samples; the same for the same seed."""

    def __init__(self, kind: TargetKind = "classification", size: int = 48, batch_size: int = 8, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.batch_size = batch_size
        self.target = _METRICS[kind]
        self.train = [_sample(kind, generator) for _ in range(size)]
        self.validation = [_sample(kind, generator) for _ in range(size // 2)]

    def train_dataloader(self) -> DataLoader[Sample]:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Sample]:
        return DataLoader(self.validation, batch_size=self.batch_size, collate_fn=collate)  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader[Sample]:
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Sample]:
        return self.val_dataloader()

    def calibration_batches(
        self, batch_size: int, max_samples: int | None = None, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> SyntheticBatches:
        return SyntheticBatches(self.train[:max_samples], batch_size, rank, world_size)
