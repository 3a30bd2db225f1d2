"""The rise of the loss to second order against per-sample gradients by autograd, and what it tells of the methods."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lowrank_pl.core import Factors, compare_methods, kronecker_groups, truncated_svd
from lowrank_pl.core.diagnosis import KRONECKER, SVD
from lowrank_pl.errors.numerics import NonFiniteError
from lowrank_pl.importance import FisherKind, LayerRises, SecondMoments, SecondOrderRise, empirical_fisher
from lowrank_pl.importance.passes import Batch
from lowrank_pl.nn import dense_weight
from lowrank_pl.surgery import TargetSelector
from tests.importance.reference import classification_loss, single_samples
from tests.importance.test_second_moments import batches, encoder


def zero(weight: Tensor) -> Factors:
    m, n = weight.shape
    return Factors(torch.zeros(m, 1), torch.zeros(1), torch.zeros(1, n))


@pytest.mark.parametrize("family", ["bert", "albert", "deberta-v2"])  # plain, shared layers, shared tensors
def test_equals_per_sample_gradients(family: str) -> None:
    model, data = encoder(family), batches(2)
    layers = TargetSelector().select(model)
    weights = {name: dense_weight(layer) for name, layer in layers.items()}
    candidates = {
        name: {
            "whole": truncated_svd(weight.detach(), min(weight.shape)),
            "some": truncated_svd(weight.detach(), 3),
            "nothing": zero(weight),
        }
        for name, weight in weights.items()
    }
    loss = classification_loss(model)
    found = SecondOrderRise(candidates).measure(model, layers, data, loss)
    samples = [sample for batch in data for sample in single_samples(batch)]
    assert found.num_samples == len(samples)
    expected = {name: torch.zeros(3, dtype=torch.float64) for name in layers}
    for sample in samples:
        gradients = torch.autograd.grad(loss(sample).sum(), list(weights.values()))
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
            for place, factors in enumerate(candidates[name].values()):
                difference = (weight.detach() - factors.product()).double()
                expected[name][place] += (gradient.double() * difference).sum().square() / (2 * len(samples))
    for name, layer in found.layers.items():
        scale = float(expected[name].max())
        torch.testing.assert_close(layer.values, expected[name], rtol=1e-3, atol=1e-5 * scale)


class Alike(nn.Module):
    """One layer whose two inputs are always the same number: `[b, 1] → [b]`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2, bias=False)
        self.layer.weight.data = torch.tensor([[3.0, -1.0], [-1.0, 3.0]])

    def losses(self, batch: Batch) -> Tensor:
        outputs: Tensor = self.layer(batch["x"].expand(-1, 2))
        signs: Tensor = batch["signs"]
        return (outputs * signs).sum(1)


def test_what_a_diagonal_cannot_see_is_recommended_by_the_whole() -> None:
    # The diagonal of the Fisher information is the same everywhere, so every method that knows it alone keeps the
    # larger group, (1, −1), which no input ever meets.
    model, generator = Alike(), torch.Generator().manual_seed(0)
    batch = {
        "x": torch.randn(64, 1, generator=generator),
        "signs": torch.randint(0, 2, (64, 2), generator=generator) * 2.0 - 1,
    }
    layers, weight = {"layer": model.layer}, model.layer.weight.detach()
    fisher = empirical_fisher(model, layers, [batch], model.losses, FisherKind.FULL).layers["layer"].full
    moments = SecondMoments().measure(model, layers, [batch], model.losses).layers["layer"]
    assert fisher is not None
    groups = kronecker_groups(weight, moments.inputs, moments.outputs)
    diagnosis, factors = compare_methods(weight, fisher, 1, groups=groups)
    assert diagnosis.recommendation == SVD
    assert diagnosis.energy_lost == pytest.approx(groups.relative_error(1) ** 2)
    rises = SecondOrderRise({"layer": factors}).measure(model, layers, [batch], model.losses).layers["layer"]
    rises.check("layer")
    judged = diagnosis.judged(dict(zip(factors, rises.values.tolist(), strict=True)))
    assert judged.recommendation == KRONECKER
    assert judged.gain == pytest.approx(1, abs=1e-3)
    assert judged.compared[SVD] > 100 * judged.compared[KRONECKER]


def test_a_rise_that_is_not_finite_is_refused_with_the_layer() -> None:
    with pytest.raises(NonFiniteError, match=r"rise of the loss of layer 'a\.b'"):
        LayerRises(torch.tensor([1.0, float("nan")])).check("a.b")
