"""What a module's encoder puts out for a batch, whatever arguments the module takes it to be called with."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl
from torch import Tensor, nn

from lowrank_pl.errors.targets import HeadError
from lowrank_pl.strategies.base import as_compressible


def outputs_of(pl_module: pl.LightningModule, run: Callable[[], object]) -> Tensor:
    """The encoder's outputs `[b, …, k]` in a pass: how it is called is the module's own.

    Args:
        pl_module: Its encoder returns a tensor, or an object with `logits`.
        run: Runs the module on a batch.

    Raises:
        HeadError: the encoder is not called once, or returns something else.
    """
    module = as_compressible(pl_module)
    seen: list[object] = []

    def hook(_: nn.Module, __: object, output: object) -> None:
        seen.append(output)

    handle = module.encoder.register_forward_hook(hook)
    try:
        run()
    finally:
        handle.remove()
    name = type(module.encoder).__name__
    if len(seen) != 1:
        raise HeadError(name, f"it is called {len(seen)} times for one batch, not once")
    outputs = seen[0] if isinstance(seen[0], Tensor) else getattr(seen[0], "logits", None)
    if not isinstance(outputs, Tensor) or outputs.ndim < 2:
        what = list(outputs.shape) if isinstance(outputs, Tensor) else type(seen[0]).__name__
        raise HeadError(
            name, f"it returns {what}, neither a tensor [samples, outputs] nor an object with such `logits`"
        )
    return outputs
