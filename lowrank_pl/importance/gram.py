"""Sums of outer products of rows, in float64. n: width of a row, t: rows, s: width of a block."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_pl.core.precision import float64_device

_BLOCK = 384
"""Columns that are multiplied at once: wide enough for full speed, and only blocks on and above the diagonal are."""


class GramSum:
    """`Σ x xᵀ` over rows, `[n, n]`, or its diagonal alone, or blocks of width `s` along it.

    Products of one batch are taken in the rows' dtype (at least float32) and added up in float64, so the error does not
    grow with the number of batches. By symmetry only blocks on and above the diagonal are multiplied.

    Args:
        size: `n`.
        device: Where the rows are; Apple's mps, which has no float64, adds up in float32.
        diagonal: Keep the diagonal only.
        dtype: Of the sums; float32 is enough for sums that fade.
        block_size: Keep only the blocks `[n / s, s, s]` along the diagonal; `s` divides `n`.
    """

    def __init__(
        self,
        size: int,
        device: torch.device,
        diagonal: bool = False,
        dtype: torch.dtype = torch.float64,
        block_size: int | None = None,
    ) -> None:
        if dtype == torch.float64 and float64_device(device) != device:
            dtype = torch.float32
        shape: tuple[int, ...] = (size,) if diagonal else (size, size)
        if block_size is not None:
            shape = (size // block_size, block_size, block_size)
        self.total = torch.zeros(shape, dtype=dtype, device=device)
        count = -(-size // _BLOCK)
        self._edges = [round(index * size / count) for index in range(count + 1)]

    def add(self, rows: Tensor) -> None:
        """Adds rows `[t, n]`."""
        rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
        if self.total.ndim == 1:
            self.total += rows.square().sum(0)
            return
        if self.total.ndim == 3:
            blocks = rows.unflatten(1, self.total.shape[:2]).transpose(0, 1)
            self.total += blocks.mT @ blocks
            return
        for start, stop in zip(self._edges, self._edges[1:], strict=False):
            block, left, right = self.total[start:stop, start:], rows[:, start:stop].mT, rows[:, start:]
            if block.dtype == rows.dtype:
                block.addmm_(left, right)  # which needs no place for the product
            else:
                block += left @ right

    def clone(self) -> GramSum:
        """The same sum, from here on apart."""
        made = object.__new__(GramSum)
        made.total, made._edges = self.total.clone(), self._edges
        return made

    def matrix(self) -> Tensor:
        """The whole symmetric matrix, the diagonal, or the blocks: the sum itself, since a copy may not fit."""
        if self.total.ndim == 2:
            for start, stop in zip(self._edges, self._edges[1:], strict=False):
                block = self.total[start:stop, start:stop]
                block.copy_(torch.triu(block) + torch.triu(block, 1).mT)
                self.total[stop:, start:stop] = self.total[start:stop, stop:].mT
        return self.total
