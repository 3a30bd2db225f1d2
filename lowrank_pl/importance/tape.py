"""Inputs and output gradients of linear layers, handed out once per layer and backward pass.

b: samples, t: tokens, m: out_features, n: in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType

import torch
from torch import Tensor, nn

Consumer = Callable[[str, Tensor, Tensor], None]


class SampleMixingError(RuntimeError):
    """A layer saw tensors whose first dimension is not the batch; internal, the caller retries by single samples."""


class LinearTape:
    """Context manager that records `x` and `∂L/∂y` of linear layers through hooks.

    The weights need no gradient: where a layer's output would not require one, its hook makes the output the
    start of the graph. One product per sample and layer then yields the sample's weight gradient,
    `g_dᵀ x_d`, without any gradient having been computed for a parameter.

    A module that is called several times in one forward pass (shared layers) gets its calls concatenated along
    the tokens: the gradient of a shared weight is the sum over its calls, and only then is it squared.

    Args:
        modules: The layers to record, by name.
        consumer: Called as `consumer(name, x [b, t, n], g [b, t, m])` once per layer and backward pass, as soon
            as the last of its calls has its gradient, so that the recorded tensors can be freed.
    """

    def __init__(self, modules: Mapping[str, nn.Linear], consumer: Consumer) -> None:
        self._modules = modules
        self._consumer = consumer
        self._copy_outputs = False
        self._batch_size = 0
        self._watched: list[tuple[Tensor, int]] | None = None
        self._open_calls: dict[str, int] = {}
        self._records: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> LinearTape:
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._forward_hook(name)))
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._records.clear()

    def start(self, batch_size: int) -> None:
        """Begins a forward pass over `b` samples."""
        self._batch_size = batch_size
        self._open_calls = dict.fromkeys(self._modules, 0)
        self._records = {name: [] for name in self._modules}

    def rehearse(self, forward: Callable[[], object]) -> None:
        """Runs a forward pass over one sample to see whether the model writes into outputs in place.

        Writing into a view gives it a new place in the graph, without the hooks of the old one: such a model gets
        copies from now on. It is found out on one sample because watching keeps every output alive.
        """
        self.start(1)
        self._watched = []
        forward()
        self._copy_outputs = any(output._version != version for output, version in self._watched)
        self._watched = None

    def finish(self) -> None:
        """Hands out what is left after the backward pass: layers with a call that no loss depended on."""
        for name in self._modules:
            self._flush(name)

    def _forward_hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = self._by_sample(args[0].detach())
            if not output.requires_grad:
                # The clone keeps models that write into the output in place working: a leaf may not be.
                output = output.detach().requires_grad_().clone()
            elif self._copy_outputs:
                output = output.clone()
            self._open_calls[name] += 1

            def on_gradient(gradient: Tensor) -> None:
                self._records[name].append((x, self._by_sample(gradient)))
                self._open_calls[name] -= 1
                if self._open_calls[name] == 0:
                    self._flush(name)

            output.register_hook(on_gradient)
            if self._watched is not None and output._is_view():
                self._watched.append((output, output._version))
            return output

        return hook

    def _by_sample(self, tensor: Tensor) -> Tensor:
        """`[b, t, features]` from `[b, features]`, `[b, …, features]` or, for one sample, anything."""
        if self._batch_size != 1 and tensor.shape[0] != self._batch_size:
            raise SampleMixingError
        return tensor.reshape(self._batch_size, -1, tensor.shape[-1])

    def _flush(self, name: str) -> None:
        records = self._records[name]
        if records:
            self._records[name] = []
            xs, gs = zip(*records, strict=True)
            x, g = (xs[0], gs[0]) if len(records) == 1 else (torch.cat(xs, 1), torch.cat(gs, 1))
            self._consumer(name, x, g)
