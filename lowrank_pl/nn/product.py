"""A product of two factors that is only multiplied when its values are needed. m, n: its shape, r: the rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

# What is answered from the factors, without multiplying them.
_FREE = {
    Tensor.dtype.__get__,  # type: ignore[attr-defined]
    Tensor.device.__get__,
    Tensor.shape.__get__,  # type: ignore[attr-defined]
    Tensor.ndim.__get__,  # type: ignore[attr-defined]
    Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.is_floating_point,
    Tensor.element_size,
}


class LazyProduct(Tensor):
    """`left [m, r] @ right [r, n]`; with an order, its rows `[right; left @ right]` in that order.

    T5's feed-forward asks its output layer for `weight.dtype` in every forward; a product each time would cost more
    than the layer itself. Every other use multiplies the factors first, and gradients reach them. Where the values lie
    is where the left factor lies: by that PEFT knows whether the head is still tied to the vocabulary.
    """

    _factors: tuple[Tensor, Tensor, Tensor | None]

    @staticmethod
    def __new__(cls, left: Tensor, right: Tensor, order: Tensor | None = None) -> LazyProduct:
        """Remembers the factors."""
        made: LazyProduct = Tensor._make_wrapper_subclass(
            cls,
            (left.shape[0] if order is None else order.shape[0], right.shape[1]),
            dtype=left.dtype,
            device=left.device,
            requires_grad=left.requires_grad or right.requires_grad,
        )
        made._factors = (left, right, order)
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answers what is free, and multiplies for the rest."""
        if func is Tensor.data_ptr:
            return args[0]._factors[0].data_ptr()
        if func in _FREE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return func(*tree_map(_multiplied, args), **tree_map(_multiplied, dict(kwargs or {})))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """For whatever gets past `__torch_function__`."""
        return func(*tree_map(_multiplied, args), **tree_map(_multiplied, dict(kwargs or {})))


def _multiplied(value: Any) -> Any:
    if not isinstance(value, LazyProduct):
        return value
    left, right, order = value._factors
    return left @ right if order is None else torch.cat([right, left @ right]).index_select(0, order)
