"""The default optimizer."""

from __future__ import annotations

import inspect
import pickle

import torch
from torch import nn

from lowrank_pl.strategies import FWSVD
from lowrank_pl.tasks import SequenceClassification, optimization
from lowrank_pl.tasks.optimization import default_optimizer


def test_a_task_can_be_pickled_with_all_its_defaults() -> None:
    task = pickle.loads(pickle.dumps(SequenceClassification("somewhere", strategy=FWSVD(keep_ratio=0.5))))
    assert task.pretrained == "somewhere"
    assert task._make_optimizer is default_optimizer


def test_the_default_is_the_one_that_the_signature_shows() -> None:
    shown = inspect.signature(SequenceClassification).parameters["optimizer"].default
    parameters = [nn.Parameter(torch.zeros(2))]
    assert default_optimizer(parameters).defaults == shown(parameters).defaults
    assert type(default_optimizer(parameters)) is type(shown(parameters))


def test_trying_an_optimizer_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    optimization.try_optimizer(lambda groups: torch.optim.AdamW(groups, lr=1e-3))
    assert torch.equal(torch.get_rng_state(), before)
