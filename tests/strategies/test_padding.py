"""Tokens that are padding count nowhere, however a model is given its mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForMultipleChoice, AutoModelForTokenClassification

from lowrank_pl import compress
from lowrank_pl.strategies import SVD, Calibration, KroneckerSVD
from lowrank_pl.strategies.padding import unpadded
from lowrank_pl.surgery import read_layout
from tests.support.tiny import tiny_config, tiny_decoder

CALIBRATION = Calibration(cache=False)


def texts(*shape: int, extra: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens and mask `[*shape, 10 + extra]`, of texts of five to eight tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 30, (*shape, 10), generator=generator)
    lengths = torch.randint(5, 9, shape, generator=generator)
    mask = (torch.arange(10) < lengths[..., None]).long()
    return F.pad(ids * mask, (0, extra)), F.pad(mask, (0, extra))


def given_by_position(model: Any, batch: Any) -> Tensor:
    ids, mask = batch
    return F.cross_entropy(model(ids, mask).logits[:, 0], ids[:, 1] % 2, reduction="none")


def of_choices(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(**batch).logits, batch["input_ids"][:, 0, 1] % 2, reduction="none")


def of_tokens(model: Any, batch: Any) -> Tensor:
    logits, labels = model(**batch).logits[:, :4], batch["input_ids"][:, 1:5]
    return F.cross_entropy(logits.mT, labels, reduction="none").mean(1)


def tagger() -> tuple[Any, Any, list[Any]]:
    model = AutoModelForTokenClassification.from_config(tiny_config("bert"))
    return model, given_by_position, [texts(6, extra=extra) for extra in (0, 4)]


def chooser() -> tuple[Any, Any, list[Any]]:
    model = AutoModelForMultipleChoice.from_config(tiny_config("bert"))
    given = [texts(4, 2, extra=extra) for extra in (0, 4)]
    return model, of_choices, [{"input_ids": ids, "attention_mask": mask} for ids, mask in given]


def decoder() -> tuple[Any, Any, list[Any]]:
    given = [texts(6, extra=extra) for extra in (0, 4)]
    return tiny_decoder("opt"), of_tokens, [{"input_ids": ids, "attention_mask": mask} for ids, mask in given]


@pytest.mark.parametrize("make", [tagger, chooser, decoder])
@pytest.mark.parametrize("option", [{"refit": True}, {"refit": False, "sequential": True}], ids=["refit", "sequential"])
def test_more_padding_changes_no_factor(make: Any, option: dict[str, Any]) -> None:
    found = []
    for which in (0, 1):
        torch.manual_seed(0)
        model, loss, batches = make()
        compress(model, [batches[which]], loss, KroneckerSVD(keep_ratio=0.4, calibration=CALIBRATION, **option))
        found.append({name: model.get_submodule(name).product() for name in read_layout(model).modules})
    assert found[0].keys() == found[1].keys()
    for name, product in found[0].items():
        # Forty tokens decide thirty-two features in part by rounding; padding that counts changes a factor by a third.
        assert (product - found[1][name]).norm() < 0.05 * product.norm()


def test_more_padding_does_not_change_how_a_head_is_recalibrated() -> None:
    found = []
    for which in (0, 1):
        torch.manual_seed(0)
        model, loss, batches = tagger()
        record = compress(model, [batches[which]], loss, SVD(keep_ratio=0.4, recalibration=True))
        found.append((model.classifier.weight.detach(), record.notes[-1]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)
    assert f"on {int(texts(6)[1].sum())} outputs" in found[0][1]


def test_a_mask_of_something_else_than_the_tokens_is_not_looked_at() -> None:
    mask = torch.tensor([[True, True, False]])
    assert unpadded(mask, torch.zeros(1, 2, 5)) is None  # audio: a mask of samples, and outputs of frames
    assert unpadded(None, torch.zeros(1, 3, 5)) is None
    assert torch.equal(unpadded(mask.long(), torch.zeros(1, 3, 5)), mask)  # type: ignore[arg-type]
