"""Sums of squared per-sample gradients of one linear layer. b: samples, t: tokens, m: out, n: in."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

CHUNK_BYTES = 256 * 2**20
"""Upper bound of the per-sample gradients held at once on an accelerator; a CPU holds one `[m, n]` at a time."""


class Accumulator(Protocol):
    """Adds up what one layer's tape hands out."""

    def add(self, x: Tensor, g: Tensor) -> None:
        """Adds the samples of `x [b, t, n]` and `g [b, t, m]`: all of them, or none where it runs out of memory."""
        ...

    def tensors(self) -> list[Tensor]:
        """The running sums, for reduction over processes and for reading."""
        ...


class Scratch:
    """Buffers `[m, n]` that layers of one shape share: one stays in the cache, and memory is one per shape."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, int], Tensor] = {}

    def get(self, out_features: int, in_features: int) -> Tensor:
        """A float32 CPU tensor `[m, n]` with arbitrary content."""
        key = (out_features, in_features)
        if key not in self._buffers:
            self._buffers[key] = torch.empty(key, dtype=torch.float32)
        return self._buffers[key]


class FullSquares:
    """`Σ_d (g_dᵀ x_d)²`, `[m, n]`, float32.

    On a CPU one product per sample goes into a buffer that stays in the cache; on an accelerator batched
    products in chunks of at most `CHUNK_BYTES` keep it busy.
    """

    def __init__(self, out_features: int, in_features: int, device: torch.device, scratch: Scratch) -> None:
        self.total = torch.zeros(out_features, in_features, device=device, dtype=torch.float32)
        self._buffer = scratch.get(out_features, in_features) if device.type == "cpu" else None

    def add(self, x: Tensor, g: Tensor) -> None:
        """Adds the samples of `x [b, t, n]` and `g [b, t, m]`."""
        x, g = x.float(), g.float()
        if self._buffer is not None:
            for x_d, g_d in zip(x, g, strict=True):
                torch.mm(g_d.mT, x_d, out=self._buffer)
                self.total.addcmul_(self._buffer, self._buffer)
            return
        step = max(1, CHUNK_BYTES // (self.total.numel() * self.total.element_size()))
        found = torch.zeros_like(self.total)
        for x_c, g_c in zip(x.split(step), g.split(step), strict=True):
            found += torch.bmm(g_c.mT, x_c).square_().sum(0)
        self.total += found

    def tensors(self) -> list[Tensor]:
        """`[total]`."""
        return [self.total]


class AxisSquares:
    """Row and column sums of `Σ_d (g_dᵀ x_d)²` without ever forming `[m, n]`.

    With the Gram matrix `K_d = g_d g_dᵀ [t, t]`, the sum over outputs for input j is
    `Σ_i (g_dᵀ x_d)_ij² = (x_dᵀ K_d x_d)_jj`, and the sums over inputs follow with the roles exchanged.
    Long samples, for which two Gram products would cost more than `[m, n]` itself, take the direct way.
    """

    def __init__(self, out_features: int, in_features: int, device: torch.device, scratch: Scratch) -> None:
        self.input_sums = torch.zeros(in_features, device=device, dtype=torch.float32)
        self.output_sums = torch.zeros(out_features, device=device, dtype=torch.float32)
        self._scratch = scratch

    def add(self, x: Tensor, g: Tensor) -> None:
        """Adds the samples of `x [b, t, n]` and `g [b, t, m]`."""
        x, g = x.float(), g.float()
        t, m, n = x.shape[1], g.shape[2], x.shape[2]
        if 2 * t * (m + n) > m * n:
            self._add_products(x, g)
            return
        inputs = torch.bmm(torch.bmm(g, g.mT), x).mul_(x).sum((0, 1))
        outputs = torch.bmm(torch.bmm(x, x.mT), g).mul_(g).sum((0, 1))
        self._add(inputs, outputs)

    def _add_products(self, x: Tensor, g: Tensor) -> None:
        inputs, outputs = torch.zeros_like(self.input_sums), torch.zeros_like(self.output_sums)
        if x.device.type == "cpu":
            squares = self._scratch.get(g.shape[2], x.shape[2])
            for x_d, g_d in zip(x, g, strict=True):
                torch.mm(g_d.mT, x_d, out=squares)
                squares.square_()
                inputs += squares.sum(0)
                outputs += squares.sum(1)
        else:
            step = max(1, CHUNK_BYTES // (g.shape[2] * x.shape[2] * x.element_size()))
            for x_c, g_c in zip(x.split(step), g.split(step), strict=True):
                chunk = torch.bmm(g_c.mT, x_c).square_().sum(0)
                inputs += chunk.sum(0)
                outputs += chunk.sum(1)
        self._add(inputs, outputs)

    def _add(self, inputs: Tensor, outputs: Tensor) -> None:
        self.input_sums += inputs
        self.output_sums += outputs

    def tensors(self) -> list[Tensor]:
        """`[input_sums, output_sums]`."""
        return [self.input_sums, self.output_sums]
