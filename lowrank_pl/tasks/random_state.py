"""Random states in checkpoints, so that a resumed run draws the dropout masks that the stopped one would have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

RANDOM_KEY = "lowrank_random_states"


def capture() -> list[dict[str, Any]]:
    """The states of torch's generators on every process, in order of rank. All processes must call it."""
    own: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        own["cuda"] = torch.cuda.get_rng_state()
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [own]
    states: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, own)
    return states


def restore(states: list[dict[str, Tensor]], rank: int) -> None:
    """Sets this process's generators; a checkpoint of another number of processes has no state for some ranks."""
    if rank < len(states):
        torch.set_rng_state(states[rank]["cpu"].cpu())
        if "cuda" in states[rank] and torch.cuda.is_available():
            torch.cuda.set_rng_state(states[rank]["cuda"].cpu())
