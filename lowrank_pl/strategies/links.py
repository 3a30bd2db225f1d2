"""How the blocks of a model follow each other: which argument of a block's call the block before has put out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_pl.strategies.replay import Call, SeenEnoughError, plain


@dataclass(frozen=True)
class FromBlock:
    """Stands in a call for a tensor that the block before puts out.

    Attributes:
        path: Where in its output the tensor is; empty where it is the output itself.
    """

    path: tuple[Any, ...]


@dataclass(frozen=True)
class Link:
    """What a pass has told of a block's call.

    Attributes:
        call: Its arguments. What the block before puts out is a `FromBlock`; all other tensors were made before the
            first block, so that no layer in a block can have a part in them.
        before: The block whose output stands in them.
    """

    call: Call
    before: str

    def after(self, output: object) -> Call:
        """The call that follows an output of the block before."""
        call: Call = _exchanged(
            self.call, lambda part: _part(output, part.path) if isinstance(part, FromBlock) else part
        )
        return call


def links(
    run: Callable[[], object], model: nn.Module, blocks: Sequence[str], layers: Iterable[nn.Module]
) -> dict[str, Link]:
    """Looks at one pass, which ends at the call of the last block.

    A block is left out of the result where its call does not follow from that of the block before: where it gets
    nothing that the block before has put out, as the first one does, or something that was written into since; where it
    gets another tensor that was made since the first block began, as decoders get from encoders; where arguments are
    more than tensors and numbers; under autocast; and behind a place outside of the blocks where the model has looked
    at a value that depends on a block, by which it may go one way or another.

    Args:
        run: A forward pass without gradients.
        model: What it runs.
        blocks: Names of modules in it that are called once each, in the order of their calls.
        layers: Modules whose call counts as the beginning, if it comes before the first block.
    """
    watcher = _Watcher(blocks[-1])
    with ExitStack() as hooks:
        for name in blocks:
            block = model.get_submodule(name)
            entering = block.register_forward_pre_hook(watcher.entering(name), with_kwargs=True)
            hooks.callback(entering.remove)
            hooks.callback(block.register_forward_hook(watcher.leaving(name)).remove)
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(watcher.begin).remove)
        with suppress(SeenEnoughError), watcher.made:
            run()
    # What was written into afterwards is not what a call began with.
    return {name: link for name, link in watcher.found.items() if not any(map(watcher.made.holds, _tensors(link.call)))}


class _Made(TorchDispatchMode):
    """Notes the memory of every tensor that is made, or written into, since it was switched on.

    What is noted and freed may be given to another tensor, which is then made later as well.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.on = False
        self.in_block = False
        self.looked = False
        self._memory: set[int] = set()

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in such memory."""
        return _memory(tensor) in self._memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.on:
            given = list(_tensors((args, kwargs)))
            if func is torch.ops.aten._local_scalar_dense.default:
                self.looked |= not self.in_block and any(map(self.holds, given))
            written = _written(func._schema, args, kwargs)
            known = {_memory(tensor) for tensor in given}
            fresh = (tensor for tensor in _tensors(result) if _memory(tensor) not in known)
            self._memory.update(_memory(tensor) for tensor in (*written, *fresh))
        return result


class _Watcher:
    """Hooks of one pass."""

    def __init__(self, last: str) -> None:
        self.made = _Made()
        self.found: dict[str, Link] = {}
        self._last = last
        self._before = ""
        self._output: list[tuple[tuple[Any, ...], Tensor, int]] = []

    def begin(self, *_: object) -> None:
        """From here on tensors may depend on what is in the blocks."""
        self.made.on = True

    def entering(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            link = self._link(args, kwargs)
            if link is not None:
                self.found[name] = link
            if name == self._last:
                raise SeenEnoughError
            self.made.on = self.made.in_block = True

        return hook

    def leaving(self, name: str) -> Any:
        def hook(_: nn.Module, __: tuple[Any, ...], output: object) -> None:
            self.made.in_block = False
            self._before = name
            self._output = [(path, tensor, tensor._version) for path, tensor in _places(output)]

        return hook

    def _link(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Link | None:
        under_autocast = any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
        if under_autocast or self.made.looked or not plain((args, kwargs)):
            return None
        paths = {id(tensor): path for path, tensor, version in self._output if tensor._version == version}
        follows = any(id(tensor) in paths for tensor in _tensors((args, kwargs)))
        call = _exchanged((args, kwargs), lambda part: FromBlock(paths[id(part)]) if id(part) in paths else part)
        return Link(call, self._before) if follows and not any(map(self.made.holds, _tensors(call))) else None


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _places(value: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """Tensors of a structure and where they are."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _places(item, (*path, key))
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from _places(item, (*path, index))


def _tensors(value: object) -> Iterator[Tensor]:
    return (tensor for _, tensor in _places(value))


def _written(schema: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors among an operation's arguments that it writes into."""
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from _tensors(args[index] if index < len(args) else kwargs.get(argument.name))


def _exchanged(value: Any, change: Callable[[Any], Any]) -> Any:
    """A structure of mappings, tuples and lists with what `change` makes of everything else in it."""
    if isinstance(value, Mapping):
        return {key: _exchanged(item, change) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [_exchanged(item, change) for item in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return change(value)


def _part(value: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        value = value[step]
    return value
