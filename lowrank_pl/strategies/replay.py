"""Layers in the order in which a model calls them, and blocks that are called again on inputs that were kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lowrank_pl.importance.batches import mapped
from lowrank_pl.nn import input_of

T = TypeVar("T")
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Stage:
    """Layers that get the same tensor.

    Attributes:
        layers: Their names.
        block: Name of the block that they are in: the outermost element of a `nn.ModuleList` around them that is called
            once in a pass. Empty where there is none, which stands for the whole model.
    """

    layers: tuple[str, ...]
    block: str

    def among(self, names: Collection[str]) -> Stage:
        """The same without the layers that are not among some."""
        return Stage(tuple(name for name in self.layers if name in names), self.block)


class SeenEnoughError(Exception):
    """Ends a forward pass behind what is looked at."""


def stages(run: Callable[[], object], model: nn.Module, layers: Sequence[str]) -> list[Stage]:
    """Layers in the order of their calls; those that get the same tensor, one after the other, together.

    Layers that are called several times, or never, are left out.

    Args:
        run: A forward pass.
        model: What it runs.
        layers: Names of modules in it.
    """
    calls: list[_LayerCall] = []  # holds the tensors, so that none takes another's place in memory
    counts: Counter[str] = Counter()
    running: list[str] = []
    candidates = {name: _elements(model, name) for name in layers}
    with ExitStack() as hooks:
        for name in dict.fromkeys(block for found in candidates.values() for block in found):
            block = model.get_submodule(name)
            hooks.callback(block.register_forward_pre_hook(_entering(counts, running, name)).remove)
            hooks.callback(block.register_forward_hook(lambda *_: running.pop() and None).remove)
        # Behind the blocks' hooks, for layers that are blocks themselves.
        for name in layers:
            hook = model.get_submodule(name).register_forward_pre_hook(_calling(calls, running, name), with_kwargs=True)
            hooks.callback(hook.remove)
        run()
    times = Counter(call.layer for call in calls)
    found: list[Stage] = []
    last: Tensor | None = None
    for call in calls:
        if times[call.layer] > 1:
            continue
        inside = [name for name in candidates[call.layer] if counts[name] == 1 and name in call.running]
        around = inside[0] if inside else ""
        if call.x is last and found and found[-1].block == around:
            found[-1] = Stage((*found[-1].layers, call.layer), around)
        else:
            found.append(Stage((call.layer,), around))
        last = call.x
    return found


@dataclass(frozen=True)
class _LayerCall:
    """A call of a layer, and the blocks in whose call it was."""

    layer: str
    x: Tensor
    running: tuple[str, ...]


def _elements(model: nn.Module, name: str) -> list[str]:
    """Those of a module's ancestors, and itself, that are elements of a `nn.ModuleList`; the outermost first."""
    parts = name.split(".")
    prefixes = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return [prefix for prefix in prefixes if isinstance(model.get_submodule(_parent(prefix)), nn.ModuleList)]


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _calling(calls: list[_LayerCall], running: list[str], name: str) -> Any:
    def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        calls.append(_LayerCall(name, input_of(args, kwargs), tuple(running)))

    return hook


def _entering(counts: Counter[str], running: list[str], name: str) -> Any:
    def hook(*_: object) -> None:
        counts[name] += 1
        running.append(name)

    return hook


def call_of(block: nn.Module, run: Callable[[], object]) -> Call | None:
    """With what a forward pass calls a block; the pass ends there.

    `None` where that is more than tensors and numbers, say a cache, which another call would change, and under
    autocast, which another call would not be under.
    """

    def look(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        under_autocast = any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
        return None if under_autocast or not plain((args, kwargs)) else (args, kwargs)

    return at_first_call(block, run, look)


def at_first_call(
    module: nn.Module, run: Callable[[], object], look: Callable[[tuple[Any, ...], dict[str, Any]], T]
) -> T | None:
    """What is seen of the arguments with which a forward pass calls a module first; the pass ends there.

    Args:
        module: Part of what `run` runs.
        run: The pass.
        look: Gets positional arguments and those by name, under the pass's own modes.

    Returns:
        What `look` has returned, `None` where the module is not called.
    """
    seen: list[T] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(look(args, kwargs))
        raise SeenEnoughError

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with suppress(SeenEnoughError):
            run()
    finally:
        handle.remove()
    return seen[0] if seen else None


def plain(value: Any) -> bool:
    """Whether a value is made of tensors and numbers alone."""
    if isinstance(value, Mapping):
        return type(value) is dict and all(map(plain, value.values()))
    if isinstance(value, (tuple, list)):
        return all(map(plain, value))
    return value is None or isinstance(value, (Tensor, bool, int, float, str, torch.dtype, torch.device))


def again(block: nn.Module, call: Call) -> object:
    """Calls a block with copies of tensors, so that what it writes into them does not reach the next call."""
    args, kwargs = mapped(call, torch.clone)
    return block(*args, **kwargs)


def neighbours(model: nn.Module, blocks: Sequence[str]) -> list[str]:
    """Blocks and the other elements of their lists, from the first to the last of the blocks, in the model's order.

    Args:
        model: The model.
        blocks: Names of elements of `nn.ModuleList`s in it.
    """
    parents = {_parent(name) for name in blocks}
    elements = [name for name, _ in model.named_modules() if name and _parent(name) in parents]
    places = [elements.index(name) for name in blocks]
    return elements[min(places) : max(places) + 1]
