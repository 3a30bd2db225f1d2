"""Which tokens are padding, as far as an attention mask tells. b: samples, t: tokens, n: features."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from lowrank_pl.importance.batches import Batch
from lowrank_pl.strategies.replay import SeenEnoughError

_NAME = "attention_mask"


def attention_mask(encoder: nn.Module, run: Callable[[], object], batch: Batch) -> Tensor | None:
    """The attention mask of a batch: what an encoder is called with under this name, or what stands so in the batch.

    Args:
        encoder: Its first call ends the pass.
        run: A pass of a module around it.
        batch: What `run` runs on.

    Returns:
        Such as `[b, t]`; `None` where there is none.
    """
    seen: list[object] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(kwargs)
        with suppress(TypeError, ValueError):  # a forward that takes anything, or that nobody can look into
            given |= inspect.signature(encoder.forward).bind_partial(*args, **kwargs).arguments
        seen.append(given.get(_NAME))
        raise SeenEnoughError

    handle = encoder.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with suppress(SeenEnoughError):
            run()
    finally:
        handle.remove()
    of_batch = batch.get(_NAME) if isinstance(batch, Mapping) else None
    return next((mask for mask in (*seen, of_batch) if isinstance(mask, Tensor)), None)


def unpadded(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Which tokens `[…, t]` of `x […, t, n]` are no padding; `None` where no mask tells.

    Inside a model the choices of a sample are samples of their own, and some layers get all tokens in one row.
    """
    if mask is None or mask.ndim < 2:
        return None
    shapes = (mask, mask.flatten(0, -2), mask.flatten())
    return next((fitting.bool() for fitting in shapes if fitting.shape == x.shape[:-1]), None)
