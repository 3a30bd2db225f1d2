"""Ranks that change under `torch.compile`: numbers that vary, instead of one compilation for each."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning.pytorch as pl

_ROOM = 16
"""Compilations of one function beyond one per layer whose rank changes: shapes, modes, the first of all."""


def is_compiled(pl_module: pl.LightningModule) -> bool:
    """Whether the module was given as `torch.compile(task)`, or a part of it is compiled in place."""
    if getattr(pl_module, "_compiler_ctx", None) is not None:
        return True
    return any(getattr(module, "_compiled_call_impl", None) is not None for module in pl_module.modules())


def varying_ranks(pl_module: pl.LightningModule, layers: int) -> AbstractContextManager[Any]:
    """A scope in which a compiled module is not compiled anew at every change of ranks.

    By default numbers that a module holds are constants to the compiler, and after 8 values of any of them it gives
    up and runs everything uncompiled. Here a rank that has changed once is a variable from then on.

    Args:
        pl_module: Left alone unless it is compiled.
        layers: How many ranks change.
    """
    if not is_compiled(pl_module):
        return nullcontext()
    import torch._dynamo as dynamo  # slow to import, and needed only here

    limit = max(dynamo.config.recompile_limit, layers + _ROOM)
    patch: AbstractContextManager[Any] = dynamo.config.patch(allow_unspec_int_on_nn_module=True, recompile_limit=limit)
    return patch
