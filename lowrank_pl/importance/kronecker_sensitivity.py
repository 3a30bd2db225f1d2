"""What every singular group is worth to the loss, from ordinary training steps. m: out_features, n: in_features."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowrank_pl.core import LinearShape
from lowrank_pl.core.kronecker import DEFAULT_DAMPING
from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.importance.gram import GramSum
from lowrank_pl.importance.reached import reached
from lowrank_pl.importance.second_moments import LayerMoments, check_blocks
from lowrank_pl.importance.sensitivity import Sensitivity


class KroneckerSensitivity(Sensitivity):
    """The second-order rise of the loss without a group, in K-FAC's metric of the model as it is being trained.

    The second moments of every layer's inputs and output gradients are collected from some training steps before each
    reallocation; sums of earlier ones fade. With them the present weight is decomposed anew, so the groups are those
    that the loss tells apart, and their energies compare across layers.

    Args:
        steps: Optimizer steps that are observed before each reallocation, `>= 1`. An observed step takes longer, the
            more the shorter the texts: `docs/rankdyna.md`.
        beta: How much of the sums is left after each observed step, `0 <= beta <= 1`.
        damping: Added to the diagonals of both moments, relative to their means, `>= 0`.
        diagonal: Collect only the diagonals of the moments: two vectors per layer instead of two matrices.
        block_size: Collect only blocks of so many features along the diagonals, between the two: `4 s (m + n)` bytes
            per layer for blocks of width `s`, which divides the features of every targeted layer.
        max_tokens: Tokens of a batch that moments are taken of, per layer and call, `>= 1`, or null for all: so many,
            evenly spread over those that a gradient comes back to, stand for all of these.

    References:
        Martens and Grosse, Optimizing neural networks with Kronecker-factored approximate curvature, ICML 2015 (the
        metric). That ranks are reallocated by it in training is this project's.
    """

    def __init__(
        self,
        steps: int = 16,
        beta: float = 0.95,
        damping: float = DEFAULT_DAMPING,
        diagonal: bool = False,
        block_size: int | None = None,
        max_tokens: int | None = 512,
    ) -> None:
        if steps < 1:
            raise RangeError("sensitivity.steps", steps, "a whole number from 1")
        if max_tokens is not None and max_tokens < 1:
            raise RangeError("sensitivity.max_tokens", max_tokens, "a whole number from 1, or null for all")
        if not (math.isfinite(beta) and 0 <= beta <= 1):
            raise RangeError("sensitivity.beta", beta, "0 <= beta <= 1, what is left of the sums after a step")
        if not (math.isfinite(damping) and damping >= 0):
            raise RangeError("sensitivity.damping", damping, "0 <= damping, relative to the mean of the diagonal")
        if block_size is not None and (diagonal or type(block_size) is not int or block_size < 1):
            raise RangeError("sensitivity.block_size", block_size, "a whole number from 1, without diagonal, or null")
        self.observed_steps = steps
        self.beta = beta
        self.damping = damping
        self.diagonal = diagonal
        self.block_size = block_size
        self.max_tokens = max_tokens
        self._sums: dict[str, _Sums] = {}
        self._steps = 0
        self._counted = False  # whether the present step is one of them

    @property
    def steps(self) -> int:
        """In how many steps something was observed that was finite."""
        return self._steps

    def begin_step(self) -> None:
        """Lets what was added before fade; called before each observed step."""
        self._counted = False
        for sums in self._sums.values():
            sums.fade(self.beta)

    def check(self, shapes: Mapping[str, LinearShape]) -> None:
        """Raises an error for blocks that do not fit.

        Raises:
            RangeError: `block_size` does not divide the features of a layer.
        """
        if self.block_size is not None:
            check_blocks("sensitivity.block_size", self.block_size, shapes)

    @torch.no_grad()
    def add(self, name: str, x: Tensor, g: Tensor, scale: float = 1.0) -> bool:
        """Adds one call of a layer; tokens without a gradient count for neither moment.

        Args:
            name: The layer.
            x: Its input, `[..., n]`.
            g: The gradient at its output, `[..., m]`.
            scale: By what the gradient of one sample's own loss was multiplied: `1 / b` in a mean over `b` samples, in
                mixed precision also the scale of the loss.

        Returns:
            Whether they were finite; otherwise nothing is added.
        """
        # A sum is NaN or Inf where an entry is; one look at both.
        if not bool(torch.isfinite(x.sum(dtype=torch.float32) + g.sum(dtype=torch.float32))):
            return False
        if not self._counted:
            self._counted = True
            self._steps += 1
        kept = reached(g).reshape(-1)
        x, g = (part.reshape(-1, part.shape[-1]) for part in (x, g))
        tokens = int(kept.sum())
        wanted = min(tokens, self.max_tokens or tokens)
        if wanted < len(kept):  # otherwise all of them: no copy
            rows = kept.nonzero().squeeze(1)[_evenly(tokens, wanted, self._steps, kept.device)]
            x, g = x[rows], g[rows]
        if name not in self._sums:
            self._sums[name] = _Sums(x.shape[-1], g.shape[-1], x.device, self.diagonal, self.block_size)
        # In float16 what is divided by the loss's scale would become zero again.
        g = g if scale == 1.0 else g.to(torch.promote_types(g.dtype, torch.float32)) / scale
        self._sums[name].add(x, g, tokens)
        return True

    def moments(self, name: str, shape: LinearShape, device: torch.device) -> list[Tensor]:
        """What processes add up for a layer: sums `[n, n]` and `[m, m]` (or diagonals, or blocks), and tokens `[1]`.

        They are copies: adding up over processes happens in place, and the sums of this one go on.
        """
        sums = self._sums.get(name)
        if sums is None:
            sums = _Sums(shape.in_features, shape.out_features, device, self.diagonal, self.block_size)
        # Those of a checkpoint are on the CPU until the layer is called again.
        inputs, outputs = (gram.clone().matrix().to(device) for gram in (sums.inputs, sums.outputs))
        return [inputs, outputs, inputs.new_tensor([sums.tokens])]

    def replace(self, name: str, inputs: Tensor, outputs: Tensor, tokens: Tensor) -> None:
        """Goes on from sums as `moments` returns them, added up over processes."""
        self._sums[name] = _Sums.restored({"inputs": inputs, "outputs": outputs, "tokens": tokens})

    @staticmethod
    def mean(inputs: Tensor, outputs: Tensor, tokens: Tensor) -> LayerMoments:
        """Moments from sums over all processes; of the outputs up to a factor that is the same for all layers."""
        return LayerMoments(inputs / max(float(tokens), 1.0), outputs)

    def bytes(self, shape: LinearShape) -> int:
        """What one layer's sums take, in float32."""
        sizes = (shape.in_features, shape.out_features)
        return 4 * sum(size * (1 if self.diagonal else self.block_size or size) for size in sizes)

    def state_dict(self) -> dict[str, Any]:
        """Tensors on the CPU and primitives, for checkpoints; the sums themselves, where they are on the CPU."""
        return {"steps": self._steps, "sums": {name: sums.state_dict() for name, sums in self._sums.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self._steps = int(state["steps"])
        self._sums = {name: _Sums.restored(found) for name, found in state.get("sums", {}).items()}

    def release(self) -> None:
        """Frees the sums."""
        self._sums = {}

    def reset(self) -> None:
        """Forgets everything."""
        self._steps, self._sums = 0, {}


def _evenly(count: int, wanted: int, turn: int, device: torch.device) -> Tensor:
    """Which of `count` rows stand for all of them: one of each of so many stretches, and others from turn to turn.

    Where in its stretch it is differs from one to the next: rows at one distance would be the same position of all
    texts where these have one length. No random numbers are drawn, so a run is the same with and without it in
    everything else.

    Args:
        count: Rows there are.
        wanted: How many of them are to be told, at most `count`.
        turn: Shifts the choice; over `count` turns all rows are told equally often.
        device: Of the rows.
    """
    stretches = torch.arange(wanted, device=device)
    if wanted == count:
        return stretches
    # Multiples of the golden ratio, 40503 / 65536 past the point, lie evenly in their unit however many there are.
    within = stretches * 40503 % 65536 * (count // wanted) // 65536
    return (stretches * count // wanted + within + turn) % count


class _Sums:
    """`Σ x xᵀ`, `Σ g gᵀ` and the number of tokens of one layer."""

    def __init__(self, n: int, m: int, device: torch.device, diagonal: bool, block_size: int | None) -> None:
        self.inputs = GramSum(n, device, diagonal, torch.float32, block_size)
        self.outputs = GramSum(m, device, diagonal, torch.float32, block_size)
        self.tokens = 0.0

    def fade(self, beta: float) -> None:
        self.inputs.total *= beta
        self.outputs.total *= beta
        self.tokens *= beta

    def add(self, x: Tensor, g: Tensor, tokens: int) -> None:
        """Adds rows `[t, n]` and `[t, m]` that stand for so many tokens."""
        if self.inputs.total.device != x.device:  # of a checkpoint
            self.inputs.total = self.inputs.total.to(x.device)
            self.outputs.total = self.outputs.total.to(x.device)
        if tokens != len(x):
            x, g = (
                rows.to(torch.promote_types(rows.dtype, torch.float32)) * (tokens / len(x)) ** 0.5 for rows in (x, g)
            )
        self.inputs.add(x)
        self.outputs.add(g)
        self.tokens += tokens

    def state_dict(self) -> dict[str, Any]:
        # As with a module's, the tensors themselves where they are on the CPU: a copy would double what sums take.
        return {"inputs": self.inputs.total.cpu(), "outputs": self.outputs.total.cpu(), "tokens": self.tokens}

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> _Sums:
        inputs, outputs = state["inputs"], state["outputs"]
        block_size = inputs.shape[-1] if inputs.ndim == 3 else None
        n, m = (len(sums) * (block_size or 1) for sums in (inputs, outputs))
        made = cls(n, m, inputs.device, inputs.ndim == 1, block_size)
        made.inputs.total, made.outputs.total = inputs.clone(), outputs.clone()
        made.tokens = float(state["tokens"])
        return made
