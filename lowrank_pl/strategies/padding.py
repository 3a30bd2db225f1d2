"""Which tokens are padding, as far as an attention mask tells. b: samples, t: tokens, n: features."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from lowrank_pl.importance.batches import Batch
from lowrank_pl.strategies.replay import at_first_call

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

    def look(args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        given = dict(kwargs)
        with suppress(TypeError, ValueError):  # a forward that takes anything, or that nobody can look into
            given |= inspect.signature(encoder.forward).bind_partial(*args, **kwargs).arguments
        return given.get(_NAME)

    seen = at_first_call(encoder, run, look)
    of_batch = batch.get(_NAME) if isinstance(batch, Mapping) else None
    return next((mask for mask in (seen, of_batch) if isinstance(mask, Tensor)), None)


def unpadded(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Which tokens `[…, t]` of `x […, t, n]` are no padding; `None` where no mask tells.

    Inside a model the choices of a sample are samples of their own, and some layers get all tokens in one row.
    """
    if mask is None or mask.ndim < 2:
        return None
    shapes = (mask, mask.flatten(0, -2), mask.flatten())
    return next((fitting.bool() for fitting in shapes if fitting.shape == x.shape[:-1]), None)
