"""A pretended Apple GPU: CPU tensors that say they are on `mps` and refuse float64 and tensors of other devices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

MPS = torch.device("mps", 0)


class PretendedTensor(Tensor):
    """Wraps a CPU tensor."""

    wrapped: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> PretendedTensor:
        if inner.dtype is torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        made: PretendedTensor = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=MPS
        )
        made.wrapped = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return compute(func, args, kwargs or {})


class PretendedMps(TorchDispatchMode):
    """Inside the block, tensors can be made on `mps` and moved there and back."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    pretended = [value for value in given if isinstance(value, PretendedTensor)]
    goal = kwargs.get("device")
    crosses = func is torch.ops.aten.copy_.default
    if pretended and not crosses and any(not isinstance(v, PretendedTensor) and v.ndim > 0 for v in given):
        raise RuntimeError("Expected all tensors to be on the same device, but found mps:0 and cpu")
    there = torch.device(goal).type == "mps" if goal is not None else bool(pretended)
    if crosses:
        there = isinstance(args[0], PretendedTensor)
    plain = {**kwargs, "device": torch.device("cpu")} if goal is not None else kwargs
    inner_args, inner_kwargs = tree_map(lambda v: v.wrapped if isinstance(v, PretendedTensor) else v, (args, plain))
    result = func(*inner_args, **inner_kwargs)
    if func._schema.is_mutable and given and result is inner_args[0]:
        return args[0]
    return tree_map(lambda v: PretendedTensor(v) if isinstance(v, Tensor) else v, result) if there else result
