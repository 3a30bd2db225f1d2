"""What an architecture computes for itself, and no file holds, stays as exact as it was computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def computed_as_before(model: nn.Module) -> Iterator[None]:
    """Gives buffers that are no part of the state their dtype back after a `with` block that rounds them.

    The frequencies of rotary positions are such: architectures compute them in float32 whatever the dtype of the
    weights. Rounded to bfloat16, as a trainer with `bf16-true` does with everything in a module, they turn what stands
    2,000 tokens apart by up to 2.5 radians too far or too little (heads of 128), and a loaded model is another one.

    Args:
        model: May be moved to another device in the block.
    """
    before = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if name in module._non_persistent_buffers_set and buffer is not None and buffer.is_floating_point()
    ]
    yield
    for module, name, buffer in before:
        now = module._buffers[name]
        if now is not None and torch.finfo(now.dtype).eps > torch.finfo(buffer.dtype).eps:
            module._buffers[name] = buffer.to(now.device)
