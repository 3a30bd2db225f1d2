"""Inputs and output gradients of layers, handed out once per layer and backward pass.

b: samples, t: tokens, m: out_features, n: in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_pl.errors.numerics import NoGradientError
from lowrank_pl.importance.vectorise import tap
from lowrank_pl.nn import input_of, is_embedding

Consumer = Callable[[str, Tensor, Tensor], None]
_Shape = tuple[int, ...]


class SampleMixingError(RuntimeError):
    """A layer saw tensors without a dimension that is the batch; internal, the caller measures another way."""


class LinearTape:
    """Context manager that records `x` and `∂L/∂y` of linear layers and look-ups through hooks.

    The weights need no gradient: where a layer's output would not require one, its hook makes the output the
    start of the graph. One product per sample and layer then yields the sample's weight gradient,
    `g_dᵀ x_d`, without any gradient having been computed for a parameter.

    A module that is called several times in one forward pass (shared layers) gets its calls concatenated along
    the tokens: the gradient of a shared weight is the sum over its calls, and only then is it squared.

    Which dimension of a layer's input is the batch is found by `rehearse`; without it, the first is taken to be.

    Args:
        modules: The layers to record, by name.
        consumer: Called as `consumer(name, x [b, t, n], g [b, t, m])` once per layer and backward pass, as soon
            as the last of its calls has its gradient, so that the recorded tensors can be freed.
    """

    def __init__(self, modules: Mapping[str, nn.Module], consumer: Consumer) -> None:
        self._modules = modules
        self._consumer = consumer
        self._copy_outputs = False
        self._batch_size = 0
        self._marker: Tensor | None = None
        self._rehearsal: dict[str, list[_Shape]] | None = None
        self._watched: list[tuple[Tensor, int]] = []
        self._batch_dims: dict[str, list[int | None]] | None = None
        self._calls: dict[str, int] = {}
        self._open_calls: dict[str, int] = {}
        self._records: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._with_gradient: set[str] = set()
        self._without_gradient: set[str] = set()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> LinearTape:
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._forward_hook(name), with_kwargs=True))
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._records.clear()

    def start(self, batch_size: int, marker: Tensor | None = None) -> None:
        """Begins a forward pass over `b` samples.

        Args:
            batch_size: `b`.
            marker: Inside `vectorised`, what it hands out: the layers then see one sample each, and are recorded for
                all `b`.
        """
        self._batch_size = batch_size
        self._marker = marker
        self._calls = dict.fromkeys(self._modules, 0)
        self._open_calls = dict.fromkeys(self._modules, 0)
        self._records = {name: [] for name in self._modules}
        self._with_gradient, self._without_gradient = set(), set()

    def rehearse(self, forward: Callable[[int], object]) -> bool:
        """Learns how the model treats batches, from one of two samples and one of three, before anything is recorded.

        The batch is the dimension of a layer's input that grows with the number of samples. No size of a single
        batch tells that: where sequences come first, a batch may have as many samples as tokens.

        It is also noticed whether the model writes into outputs in place. Writing into a view gives it a new place
        in the graph, without the hooks of the old one: such a model gets copies from now on. It is found out on few
        samples because watching keeps every output alive.

        Args:
            forward: Runs the model on so many samples, all of one length in tokens.

        Returns:
            Whether every call of every layer has such a dimension.
        """
        seen = [self._shapes(forward, size) for size in (2, 3)]
        self._batch_dims = {
            name: [_batch_dim(two, three) for two, three in zip(seen[0][name], seen[1][name], strict=True)]
            if len(seen[0][name]) == len(seen[1][name])
            else [None]
            for name in self._modules
        }
        return all(dim is not None for dims in self._batch_dims.values() for dim in dims)

    def finish(self) -> None:
        """Hands out what is left after the backward pass: layers with a call that no loss depended on.

        Raises:
            NoGradientError: a layer was only called where autograd records nothing.
        """
        for name in self._modules:
            if name in self._without_gradient - self._with_gradient:
                raise NoGradientError(name)
            self._flush(name)

    def _shapes(self, forward: Callable[[int], object], size: int) -> dict[str, list[_Shape]]:
        """The shape of every layer's input, call by call."""
        self.start(size)
        shapes: dict[str, list[_Shape]] = {name: [] for name in self._modules}
        self._rehearsal = shapes
        self._watched = []
        try:
            forward(size)
            self._copy_outputs |= any(output._version != version for output, version in self._watched)
        finally:
            self._rehearsal, self._watched = None, []
        return shapes

    def _forward_hook(self, name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            given = input_of(args, kwargs)
            if is_embedding(module):  # the one feature of a look-up's input is the number of the token
                given = given.unsqueeze(-1)
            if self._marker is not None:
                return tap(given, output, self._marker, lambda x, y: self._recorded(name, x, y, 0))
            if self._rehearsal is None:
                return self._recorded(name, given, output, self._batch_dim(name))
            self._rehearsal[name].append(tuple(given.shape))
            output = self._prepared(output)
            if output._is_view():
                self._watched.append((output, output._version))
            return output

        return hook

    def _prepared(self, output: Tensor) -> Tensor:
        """The output as a tensor that gets a gradient and whose hooks survive what the model does to it."""
        if not output.requires_grad:
            # The clone keeps models that write into the output in place working: a leaf may not be.
            return output.detach().requires_grad_().clone()
        return output.clone() if self._copy_outputs else output

    def _recorded(self, name: str, x: Tensor, output: Tensor, dim: int) -> Tensor:
        """Records one call; returns the output that the model goes on with."""
        if not torch.is_grad_enabled():
            self._without_gradient.add(name)
            return output
        self._with_gradient.add(name)
        x = self._by_sample(x.detach(), dim)
        output = self._prepared(output)
        self._open_calls[name] += 1

        def on_gradient(gradient: Tensor) -> None:
            self._records[name].append((x, self._by_sample(gradient, dim)))
            self._open_calls[name] -= 1
            if self._open_calls[name] == 0:
                self._flush(name)

        output.register_hook(on_gradient)
        return output

    def _batch_dim(self, name: str) -> int:
        """The dimension that is the batch in the current call of a layer."""
        call = self._calls[name]
        self._calls[name] += 1
        if self._batch_size == 1 or self._batch_dims is None:
            return 0
        dims = self._batch_dims[name]
        # Long texts may be taken in more pieces than were rehearsed: all of them alike, or it is not known.
        alike = dims[0] if len(set(dims)) == 1 else None
        dim = dims[call] if call < len(dims) else alike
        if dim is None:
            raise SampleMixingError
        return dim

    def _by_sample(self, tensor: Tensor, dim: int) -> Tensor:
        """`[b, t, features]` from `[…, b, …, features]` or, for one sample, anything."""
        if self._batch_size != 1:
            if dim >= tensor.ndim - 1 or tensor.shape[dim] != self._batch_size:
                raise SampleMixingError
            tensor = tensor.movedim(dim, 0)
        return tensor.reshape(self._batch_size, -1, tensor.shape[-1])

    def _flush(self, name: str) -> None:
        records = self._records[name]
        if records:
            self._records[name] = []
            xs, gs = zip(*records, strict=True)
            x, g = (xs[0], gs[0]) if len(records) == 1 else (torch.cat(xs, 1), torch.cat(gs, 1))
            self._consumer(name, x, g)


def _batch_dim(two: _Shape, three: _Shape) -> int | None:
    """The one dimension, but for the features, that is 2 for two samples and 3 for three; `None` without one."""
    if len(two) != len(three):
        return None
    differing = [dim for dim, (a, b) in enumerate(zip(two, three, strict=True)) if a != b]
    if len(differing) != 1 or differing[0] == len(two) - 1:
        return None
    (dim,) = differing
    return dim if (two[dim], three[dim]) == (2, 3) else None
