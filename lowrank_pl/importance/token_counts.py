"""How often each token was looked up: the second moment of a look-up's one-hot inputs. t: tokens, v: vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_pl.core.precision import float64_device


class TokenCounts:
    """`Σ x xᵀ` over one-hot rows `x`: a diagonal `[v]` that holds how often each token was seen.

    Args:
        size: v.
        device: Where the tokens are.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        wide = float64_device(device) == device
        self.total = torch.zeros(size, dtype=torch.float64 if wide else torch.float32, device=device)

    def add(self, tokens: Tensor) -> None:
        """Adds the numbers of tokens `[t, 1]`."""
        tokens = tokens.flatten()
        self.total.index_add_(0, tokens, torch.ones_like(tokens, dtype=self.total.dtype))

    def matrix(self) -> Tensor:
        """The diagonal."""
        return self.total


def frequencies(counts: Tensor, tokens: float) -> Tensor:
    """Shares `(counts + 1) / (tokens + v)` of all tokens, as if each had been seen once more.

    Without that, a token which the calibration samples lack would count for nothing, and its row could become anything.
    The shares add up to 1, so energies keep the unit that they have in linear layers, whose moments are means, too.

    Args:
        counts: `[v]`.
        tokens: Their sum.
    """
    return (counts + 1) / (tokens + counts.numel())
