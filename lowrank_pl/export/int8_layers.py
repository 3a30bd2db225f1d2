"""A folder for torch in eight bits: the linear layers of the blocks, by torchao."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_pl.checkpoint import Scheme, from_pretrained, quantize_
from lowrank_pl.checkpoint.int8 import stored_bytes
from lowrank_pl.errors.export import QuantizationError
from lowrank_pl.export.int8 import distance_told
from lowrank_pl.export.onnx_file import model_inputs, shapes_to_compare


class QuantizedLayers:
    """Brings a model's linear layers to int8 in place, and tells what that does to it.

    Args:
        model: In eval mode, on the CPU, in float32.
        scheme: See `quantize_`.

    Raises:
        QuantizedModelError, QuantizationError, MissingPackagesError: see `quantize_`.
    """

    def __init__(self, model: PreTrainedModel, scheme: Scheme) -> None:
        self._inputs = [model_inputs(model, *shape) for shape in shapes_to_compare(model)]
        self._float, before = _logits(model, self._inputs), _bytes(model)
        layers = quantize_(model, scheme)
        self._model = model
        self._told = {"scheme": scheme, "layers": len(layers), "bytes": [before, _bytes(model)]}

    def compare(self, folder: Path) -> dict[str, Any]:
        """Reads the folder back that the model was written to.

        Returns:
            For report.json: the `scheme`, how many `layers` are in int8, `bytes` of all parameters and buffers before
            and after, and how far the logits on random tokens and padding are from float32, as in `quantize_int8`.

        Raises:
            QuantizationError: the folder computes anything else than the model, or the logits are too far away.
        """
        name = type(self._model).__name__
        expected, found = (_logits(model, self._inputs) for model in (self._model, from_pretrained(str(folder))))
        if not all(torch.equal(mine, theirs) for mine, theirs in zip(expected, found, strict=True)):
            raise QuantizationError(name, "read back, its logits are others")
        return {**self._told, **distance_told(list(zip(found, self._float, strict=True)), name)}


@torch.inference_mode()
def _logits(model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    return [model(**inputs).logits for inputs in batches]


def _bytes(model: PreTrainedModel) -> int:
    return sum(stored_bytes(tensor) for tensor in (*model.parameters(), *model.buffers()))
