"""Inputs for whole models, and what one forward pass costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from lowrank_pl.checkpoint.int8 import stored_bytes
from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.errors.run import NotOfTextsAloneError
from lowrank_pl.hub import longest_input


def inputs_for(model: PreTrainedModel, batch_size: int, length: int) -> dict[str, Tensor]:
    """Random token ids `[batch_size, length]` without padding.

    Raises:
        RangeError: the model takes no texts of this length.
        NotOfTextsAloneError: it reads no tokens.
    """
    words = getattr(model.config, "vocab_size", None)
    if words is None:
        raise NotOfTextsAloneError(type(model).__name__, "its config.json has no vocab_size")
    longest = longest_input(model)
    if length > longest:
        raise RangeError("lengths", length, f"1 … {longest}, the model's longest text")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(5, words - 1), words, (batch_size, length), generator=generator)
    return {"input_ids": ids.to(model.device), "attention_mask": torch.ones_like(ids).to(model.device)}


def count_flops(model: PreTrainedModel, inputs: dict[str, Tensor]) -> int:
    """Floating-point operations of the matrix products of one forward pass, attention's included."""
    # The fused attention of CPUs is not counted; the plain one is.
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._int_mm: _of_whole_numbers})
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(**inputs)
    return int(counter.get_total_flops())


def _of_whole_numbers(left: Sequence[int], right: Sequence[int], *_: object, **__: object) -> int:
    """Operations of a product `[m, k] [k, n]` in eight bits, counted as those of one in float."""
    return 2 * left[0] * left[1] * right[1]


def peak_memory(model: PreTrainedModel, run: Callable[[], object]) -> int | None:
    """Bytes of a model's own weights and of what a call needs beside them at its peak; only CUDA reports it."""
    device = model.device
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)  # other models lie there too
    run()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device)) - before + weight_bytes(model)


def weight_bytes(model: PreTrainedModel) -> int:
    """Memory of parameters and buffers, in eight bits where they are; a tied one counts once."""
    return sum(stored_bytes(tensor) for tensor in (*model.parameters(), *model.buffers()))
