"""One scale and one bias per output that bring a model's outputs close to another's. d: samples, k: outputs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lowrank_pl.core.checks import check_finite
from lowrank_pl.core.precision import double
from lowrank_pl.errors.numerics import ShapeError

_RIDGE = 1e-3
"""Pull towards scale 1 and bias 0, as share of the objective's own curvature: what no sample decides stays as it is."""


def match_distributions(outputs: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Minimises the mean divergence `KL(softmax(reference) ‖ softmax(scale · outputs + bias))`, which is convex.

    Args:
        outputs: Logits `[d, k]` to change.
        reference: Logits `[d, k]` of the same samples to come close to.

    Returns:
        `scale [k]` and `bias [k]`, float64. They never make the divergence larger than scale 1 and bias 0 do.

    Raises:
        ShapeError, NonFiniteError: bad logits.
    """
    # The fit needs a graph, whatever mode the caller runs in.
    with torch.inference_mode(False), torch.enable_grad():
        return _match_distributions(*_checked(outputs, reference))


def _match_distributions(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    wanted = target.softmax(1)
    scale, bias = torch.ones_like(x[0]).requires_grad_(), torch.zeros_like(x[0]).requires_grad_()
    spread = float(x.var(0).mean()) if len(x) > 1 else 0.0
    optimizer = torch.optim.LBFGS([scale, bias], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        divergence = F.kl_div((scale * x + bias).log_softmax(1), wanted, reduction="batchmean")
        loss = divergence + _RIDGE * (spread * (scale - 1).square().mean() + bias.square().mean())
        loss.backward()
        return loss

    optimizer.step(closure)
    found = scale.detach(), bias.detach()
    return found if all(bool(torch.isfinite(part).all()) for part in found) else (torch.ones_like(x[0]), 0 * x[0])


def match_values(outputs: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Minimises `Σ (scale · outputs + bias − reference)²` per output, in closed form.

    Args:
        outputs: Values `[d, k]` to change.
        reference: Values `[d, k]` of the same samples to come close to.

    Returns:
        `scale [k]` and `bias [k]`, float64; scale 1 where outputs do not vary.

    Raises:
        ShapeError, NonFiniteError: bad values.
    """
    x, target = _checked(outputs, reference)
    x_mean, target_mean = x.mean(0), target.mean(0)
    variance = (x - x_mean).square().mean(0)
    covariance = ((x - x_mean) * (target - target_mean)).mean(0)
    # A scale that turns the sign or wipes the output out says that the samples decide nothing.
    scale = torch.where((variance > 0) & (covariance > 0), covariance / variance.clamp(min=1e-300), 1.0)
    return scale, target_mean - scale * x_mean


def _checked(outputs: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    if outputs.ndim != 2 or outputs.shape != reference.shape or outputs.numel() == 0:
        raise ShapeError(
            "outputs", tuple(outputs.shape), f"[samples, outputs] as the reference {list(reference.shape)}"
        )
    check_finite("outputs", outputs)
    check_finite("the reference outputs", reference)
    return double(outputs.detach()).clone(), double(reference.detach()).clone()
