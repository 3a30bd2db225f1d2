"""Tiny random encoders in memory, and inputs for them."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from lowrank_pl.nn import SVDLinear
from lowrank_pl.surgery import TargetSelector, replace_module_
from tests.support.tiny import VOCAB, tiny_config

HEADS: dict[str, Any] = {
    "sequence": AutoModelForSequenceClassification,
    "token": AutoModelForTokenClassification,
    "masked_lm": AutoModelForMaskedLM,
}


def tiny_model(family: str, head: str = "sequence", seed: int = 0, num_labels: int = 3) -> nn.Module:
    """A tiny encoder of a family in eval mode; the global random state stays where it was."""
    config = tiny_config(family)
    config.num_labels = num_labels
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = HEADS[head].from_config(config)
        # Fresh biases are zero and fresh weights small; both would hide mistakes.
        for parameter in model.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    for module in model.modules():
        # MobileBERT looks at the following token: only a zero [PAD] equals the end of the text.
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight.data[module.padding_idx] = 0
    return model.eval()


def padded_batch(lengths: tuple[int, ...] = (9, 4, 7), seed: int = 0) -> dict[str, Tensor]:
    """Random words between [CLS] and [SEP], padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(5, len(VOCAB), (length,), generator=generator)
        ids[row, 0], ids[row, length - 1] = VOCAB["[CLS]"], VOCAB["[SEP]"]
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask}


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The model's logits with those of padding set to zero."""
    with torch.no_grad():
        out: Tensor = model(**batch).logits
    return out if out.ndim == 2 else out * batch["attention_mask"][..., None]


def in_groups_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Turns the targets into layers in singular groups as training leaves them: neither orthonormal nor full."""
    generator = torch.Generator().manual_seed(seed)
    for name, linear in TargetSelector().select(model).items():
        layer = SVDLinear.from_linear(linear)
        for parameter in layer.parameters():
            parameter.data.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
        layer.rank = int(torch.randint(2, layer.capacity, (), generator=generator))
        replace_module_(model, name, layer)
    return model
