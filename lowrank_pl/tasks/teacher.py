"""The model that another one learns from, kept out of everything that is trained, counted and saved. b: samples."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_pl.checkpoint import is_quantized
from lowrank_pl.checkpoint.int8 import plain_tensors
from lowrank_pl.importance.identity import identity


class Teacher:
    """A model in eval mode that no gradient reaches.

    It is not an `nn.Module`: as an attribute of one it is in no state dict, optimizer, process group or parameter
    count. Copies of a module, such as those that average its weights, share it.

    Args:
        model: With its head; is changed.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model.eval().requires_grad_(False)
        self._inputs = frozenset(inspect.signature(model.forward).parameters)

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        return self

    def __call__(self, batch: Mapping[str, Tensor], hidden_states: bool) -> tuple[Tensor, Sequence[Tensor]]:
        """What it makes of a batch, in the precision of whoever asks.

        Args:
            batch: Model inputs, on the device of the model that learns; those that this one does not take, such as
                token types, are left out.
            hidden_states: Whether they are asked for.

        Returns:
            Logits, float32, and the hidden states after each block, empty unless asked for.
        """
        self.to(batch["input_ids"].device)
        inputs = {name: tensor for name, tensor in batch.items() if name in self._inputs and name != "labels"}
        with torch.no_grad():
            found = self._model(**inputs, **wanting(hidden_states))
        return found.logits.float(), after_blocks(found)

    @cached_property
    def digest(self) -> str:
        """Identifies its weights."""
        state = plain_tensors(self._model) if is_quantized(self._model) else self._model.state_dict()
        return identity({name: tensor.cpu() for name, tensor in state.items()})

    def to(self, device: torch.device) -> None:
        """Moves it, unless it is there."""
        if next(self._model.parameters()).device != device:
            self._model.to(device)


def wanting(hidden_states: bool) -> dict[str, bool]:
    """The argument of a model's `forward` for its hidden states; none where they are not asked for."""
    return {"output_hidden_states": True} if hidden_states else {}


def after_blocks(found: Any) -> Sequence[Tensor]:
    """The hidden states after each block, without the embeddings'; empty where they were not asked for."""
    return (getattr(found, "hidden_states", None) or ())[1:]
