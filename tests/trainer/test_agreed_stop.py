"""How several processes agree to stop; runs that are stopped: `tests/cli/test_stopped.py`."""

from __future__ import annotations

import signal
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lowrank_pl.trainer.agreed_stop import AgreedStop


def test_the_handler_says_nothing_to_other_processes_and_all_leave_at_the_next_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[Any] = []
    trainer: Any = SimpleNamespace(
        global_rank=0,
        world_size=2,
        strategy=SimpleNamespace(root_device=torch.device("cpu"), launcher=SimpleNamespace(kill=sent.append)),
        _signal_connector=SimpleNamespace(received_sigterm=False),
    )
    asked: list[int] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, op: asked.append(int(tensor)))
    stop = AgreedStop(trainer)
    stop.agree()
    stop.remember(signal.SIGTERM)
    assert (sent, asked) == ([signal.SIGTERM], [0])
    assert not trainer._signal_connector.received_sigterm  # by which each process would leave where it is
    with pytest.raises(SIGTERMException):
        stop.agree()
    # The signal reached another process.
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, op: tensor.fill_(1))
    with pytest.raises(SIGTERMException):
        AgreedStop(trainer).agree()
    # Before the first training batch there is no place to agree.
    AgreedStop(trainer).remember(signal.SIGTERM)
    assert trainer._signal_connector.received_sigterm
