"""A model as it lies on disk: its configuration, the shapes of its layers, its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from lowrank_pl.checkpoint.int8 import Scheme, is_int8
from lowrank_pl.contract import TargetSpec
from lowrank_pl.errors.checkpoint import CheckpointMismatchError, QuantizedModelError
from lowrank_pl.surgery import CompressionRecord, ModelLayout, compact_state, conform_
from lowrank_pl.surgery.record import DENSE

ENCODER_PREFIX = "encoder."
"""What a task's state dict puts before the names of the model in it."""


@dataclass(frozen=True)
class SavedModel:
    """A model as it lies on disk.

    Attributes:
        source: Where it came from, for messages.
        config: The Hugging Face configuration, head included.
        layout: Which layers are factorised.
        state: Parameters and buffers of the encoder with its head.
        target: What it predicts, where the file tells.
        compression: How it was compressed, where it was and the file tells.
        tokenizer: Where its tokenizer is, as in `resolve_pretrained`, where the file tells.
        generation: The generation config, where the file tells one.
        auto_class: Name of the class of transformers that makes it, such as `"AutoModelForMaskedLM"`; `None` where the
            file does not tell, as a dense folder.
        scheme: What is in eight bits, where layers are; `state` has their weights as tensors of torchao.
        step: The optimizer steps after which a training wrote it, where the file tells.
        dense_folder: A Hugging Face folder whose weights are still to be read, by its own loader; `state` is empty.
    """

    source: str
    config: PreTrainedConfig
    layout: ModelLayout
    state: dict[str, Tensor]
    target: TargetSpec | None = None
    compression: CompressionRecord | None = None
    dense_folder: str | None = None
    tokenizer: str | None = None
    auto_class: str | None = None
    scheme: Scheme | None = None
    generation: Mapping[str, Any] | None = None
    step: int | None = None

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the classes that the head tells apart, in its order; empty for a single output."""
        if self.target is not None:
            return self.target.label_names
        labels = {int(index): name for index, name in (self.config.id2label or {}).items()}
        return tuple(labels[index] for index in sorted(labels)) if len(labels) > 1 else ()

    def check_float(self, asked_by: str) -> None:
        """Raises `QuantizedModelError` where layers are in eight bits and their weights are needed."""
        if self.scheme is not None:
            raise QuantizedModelError(self.source, asked_by)

    def compacted(self) -> SavedModel:
        """The same with layers in a form of training brought to the form that is deployed."""
        records = self.compression.layers if self.compression is not None else ()
        forms = {layer.name: layer.kind for layer in records}
        dense = [name for name, kind in forms.items() if kind == DENSE]
        state, layout = compact_state(self.state, self.layout, dense, self.source, forms)
        return self if layout == self.layout else replace(self, layout=layout, state=state)

    def replace_in(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A task's state dict with these entries as those of its encoder."""
        others = {name: tensor for name, tensor in state.items() if not name.startswith(ENCODER_PREFIX)}
        return others | {f"{ENCODER_PREFIX}{name}": tensor for name, tensor in self.state.items()}

    def load_into_(self, encoder: nn.Module) -> None:
        """Gives an encoder this model's shapes and values.

        Raises:
            CheckpointMismatchError: any key is missing or unexpected or has another shape, or two differ that are one
                tensor in the encoder; its values are then untouched.
        """
        conform_(encoder, self.layout, self.source)
        state = {**self.state, **_tied(encoder, self.state, self.source)}
        check_state(encoder.state_dict(), state, self.source)
        int8 = {name: tensor for name, tensor in state.items() if is_int8(tensor)}
        for name, tensor in int8.items():  # not copied: that would round the scales of the parameters that are there
            layer = encoder.get_submodule(name.rpartition(".")[0])
            layer.weight = nn.Parameter(tensor, requires_grad=False)
        encoder.load_state_dict({name: state[name] for name in state.keys() - int8.keys()}, strict=False)


def tied_names(model: nn.Module) -> list[list[str]]:
    """The names of every parameter and buffer that has several in a model's state dict."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _tied(encoder: nn.Module, state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Values for names that a file leaves out because the model ties them to a name that it has.

    Raises:
        CheckpointMismatchError: the file has several values for what is one tensor in the model.
    """
    found = {}
    for group in tied_names(encoder):
        present = [name for name in group if name in state]
        for name in present[1:]:
            if not same_values(state[present[0]], state[name]):
                problem = f"{present[0]!r} and {name!r} differ there and are one tensor here"
                raise CheckpointMismatchError(source, problem)
        if present:
            found.update({name: state[present[0]] for name in group if name not in state})
    return found


def same_values(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have the same values; checkpoints have tied ones in one place."""
    return first.data_ptr() == second.data_ptr() or torch.equal(first, second)


def check_state(own: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> None:
    """Raises `CheckpointMismatchError` unless keys and shapes agree exactly."""
    missing, unexpected = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    if missing or unexpected:
        raise CheckpointMismatchError.keys(source, missing, unexpected)
    for name, tensor in own.items():
        if tensor.shape != given[name].shape:
            problem = f"{name!r} is {list(given[name].shape)} there and {list(tensor.shape)} here"
            raise CheckpointMismatchError(source, problem)
