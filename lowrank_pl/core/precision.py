"""Where float64 is computed: every factorisation needs it, and not every device has it."""

from __future__ import annotations

import torch
from torch import Tensor

_WITHOUT_FLOAT64 = frozenset({"mps"})


def float64_device(device: torch.device) -> torch.device:
    """The device itself, or the CPU where the device has no float64 (Apple's GPUs)."""
    return torch.device("cpu") if device.type in _WITHOUT_FLOAT64 else device


def beside_float64(tensor: Tensor) -> Tensor:
    """The tensor in its own dtype, on `float64_device` of its own."""
    return tensor.to(float64_device(tensor.device))


def double(tensor: Tensor) -> Tensor:
    """The tensor in float64, on `float64_device` of its own."""
    return beside_float64(tensor).double()
