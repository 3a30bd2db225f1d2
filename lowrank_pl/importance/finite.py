"""Where in a forward pass NaN or Inf first come up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_pl.nn import input_of


def first_not_finite(modules: Mapping[str, nn.Module], run: Callable[[], object], inputs: bool = False) -> str | None:
    """The first of some modules that puts out NaN or Inf in a forward pass, in words; `None` where none does.

    A module is looked at when it is done, so those inside come before the one around them. The pass ends there.

    Args:
        modules: By name. Of one that is called several times each call counts.
        run: A forward pass through them.
        inputs: Whether they are linear layers and look-ups, of which what they get is looked at as well.
    """
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
            parts = {"input": input_of(args, kwargs)} if inputs else {}
            for part, value in {**parts, "output": output}.items():
                if not is_finite(value):
                    found.append(f"the {part} of {_told(name, module, inputs)}")
                    raise _FoundError

        return hook

    handles = [module.register_forward_hook(watch(name), with_kwargs=True) for name, module in modules.items()]
    try:
        with torch.no_grad():
            run()
    except _FoundError:
        return found[0]
    finally:
        for handle in handles:
            handle.remove()
    return None


class _FoundError(Exception):
    """Ends a forward pass."""


def is_finite(value: object) -> bool:
    """Whether no tensor in a value has NaN or Inf."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, Mapping):
        return all(map(is_finite, value.values()))
    return not isinstance(value, (tuple, list)) or all(map(is_finite, value))


def _told(name: str, module: nn.Module, is_layer: bool) -> str:
    """A module by its name, or its class where it is the whole, and which of its own parameters are to blame."""
    own = module.named_parameters(recurse=False)
    bad = [parameter for parameter, values in own if not bool(torch.isfinite(values).all())]
    blamed = f", whose {bad[0]} is not finite" if bad else ""
    return f"{'layer' if is_layer else 'module'} {name or type(module).__name__!r}{blamed}"
