"""b = 3 samples, t = 5 tokens, n = 4 inputs."""

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowrank_pl.errors.numerics import NoGradientError
from lowrank_pl.importance.passes import Passes
from lowrank_pl.importance.tape import LinearTape, SampleMixingError
from tests.core.matrices import random_matrix

Record = dict[str, list[tuple[Tensor, Tensor]]]


def linear(out_features: int, in_features: int, seed: int) -> nn.Linear:
    layer = nn.Linear(in_features, out_features)
    layer.weight.data.copy_(random_matrix(out_features, in_features, seed=seed))
    layer.bias.data.copy_(random_matrix(out_features, seed=seed + 1))
    return layer.requires_grad_(False)


def play(
    layers: dict[str, nn.Linear], losses: Callable[..., Tensor], batch_size: int = 3, rehearsed: bool = False
) -> Record:
    records: Record = {name: [] for name in layers}
    with LinearTape(layers, lambda name, x, g: records[name].append((x, g))) as tape:
        if rehearsed:
            assert tape.rehearse(losses)
        tape.start(batch_size)
        losses().sum().backward()
        tape.finish()
    return records


def weight_gradients(layers: dict[str, nn.Linear], losses: Callable[[], Tensor]) -> list[dict[str, Tensor]]:
    """Per sample, by autograd on the weights."""
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    each = [
        torch.autograd.grad(loss, [layer.weight for layer in layers.values()], retain_graph=True)
        for loss in losses().unbind()
    ]
    for layer in layers.values():
        layer.weight.requires_grad_(False)
    return [dict(zip(layers, gradients, strict=True)) for gradients in each]


def assert_gradients_match(
    layers: dict[str, nn.Linear], losses: Callable[..., Tensor], rehearsed: bool = False
) -> None:
    expected = weight_gradients(layers, losses)
    records = play(layers, losses, rehearsed=rehearsed)
    for name in layers:
        ((x, g),) = records[name]  # handed out exactly once
        for d, gradients in enumerate(expected):
            torch.testing.assert_close(g[d].mT @ x[d], gradients[name], rtol=1e-5, atol=1e-5)


def test_products_of_what_is_handed_out_are_the_weight_gradients() -> None:
    layers = {"a": linear(6, 4, 0), "b": linear(2, 6, 10)}
    x = random_matrix(3, 5, 4)
    assert_gradients_match(layers, lambda: layers["b"](layers["a"](x).tanh()).square().sum((1, 2)))
    ((seen, gradient),) = play(layers, lambda: layers["b"](layers["a"](x)).sum((1, 2)))["a"]
    assert (seen.shape, gradient.shape) == ((3, 5, 4), (3, 5, 6))


@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 5, 4)])
def test_inputs_of_any_rank_come_as_samples_by_tokens(shape: tuple[int, ...]) -> None:
    layers, x = {"a": linear(6, 4, 0)}, random_matrix(*shape)
    losses: Callable[[], Tensor] = lambda: layers["a"](x).square().flatten(1).sum(1)  # noqa: E731
    ((seen, gradient),) = play(layers, losses)["a"]
    assert seen.shape == (3, x[0].numel() // 4, 4)
    assert gradient.shape == (3, x[0].numel() // 4, 6)
    assert_gradients_match(layers, losses)


IN_PLACE: dict[str, Callable[[Tensor], object]] = {
    "mul_": lambda y: y.mul_(3),
    "relu_": lambda y: y.relu_(),
    "add_": lambda y: y.add_(y.detach()),
}


@pytest.mark.parametrize("change", IN_PLACE)
@pytest.mark.parametrize("shape", [(3, 4), (3, 5, 4)])
def test_a_first_layer_whose_output_is_modified_in_place(change: str, shape: tuple[int, ...]) -> None:
    layers, x = {"first": linear(4, 4, 0)}, random_matrix(*shape)

    def losses() -> Tensor:
        out: Tensor = layers["first"](x)
        IN_PLACE[change](out)
        return out.square().flatten(1).sum(1)

    assert_gradients_match(layers, losses)


@pytest.mark.parametrize("change", IN_PLACE)
@pytest.mark.parametrize("shape", [(3, 4), (3, 5, 4)])
@pytest.mark.parametrize("rehearsed", [True, False])
def test_a_later_layer_whose_output_is_modified_in_place(change: str, shape: tuple[int, ...], rehearsed: bool) -> None:
    layers, x = {"first": linear(4, 4, 0), "later": linear(4, 4, 10)}, random_matrix(*shape)

    def losses(samples: int = 3) -> Tensor:
        out: Tensor = layers["later"](layers["first"](x[:samples]).tanh())
        IN_PLACE[change](out)
        return out.square().flatten(1).sum(1)

    if rehearsed or len(shape) == 2:
        assert_gradients_match(layers, losses, rehearsed)
    else:  # the output is a view, and writing into a view drops its hook: why there are rehearsals
        assert play(layers, losses)["later"] == []


def test_a_layer_called_several_times_is_handed_out_once_with_all_its_tokens() -> None:
    layers, x = {"a": linear(4, 4, 0)}, random_matrix(3, 5, 4)
    losses: Callable[[], Tensor] = lambda: layers["a"](layers["a"](x).tanh()).square().sum((1, 2))  # noqa: E731
    ((seen, _),) = play(layers, losses)["a"]
    assert seen.shape == (3, 10, 4)
    assert_gradients_match(layers, losses)


def test_a_call_that_no_loss_depends_on_adds_nothing() -> None:
    layers, x = {"a": linear(4, 4, 0), "unused": linear(4, 4, 10)}, random_matrix(3, 5, 4)

    def losses() -> Tensor:
        layers["a"](x + 1)
        layers["unused"](x)
        result: Tensor = layers["a"](x).square().sum((1, 2))
        return result

    records = play(layers, losses)
    ((seen, _),) = records["a"]
    assert torch.equal(seen, x)
    assert records["unused"] == []


def test_tensors_shared_by_the_samples_are_noticed_in_the_forward_pass() -> None:
    layers, shared = {"a": linear(4, 4, 0)}, random_matrix(1, 5, 4)
    with pytest.raises(SampleMixingError):
        play(layers, lambda: layers["a"](shared).sum().expand(3))
    ((seen, _),) = play(layers, lambda: layers["a"](shared).sum().expand(1), batch_size=1)["a"]
    assert seen.shape == (1, 5, 4)


@pytest.mark.parametrize("batch_dim", [0, 1, 2])
def test_the_batch_is_the_dimension_that_grows_with_the_samples(batch_dim: int) -> None:
    # Three samples of three tokens in three pieces: no size tells which is which.
    layers, x = {"a": linear(6, 4, 0)}, random_matrix(3, 3, 3, 4)

    def losses(samples: int = 3) -> Tensor:
        out: Tensor = layers["a"](x[:samples].movedim(0, batch_dim)).tanh()
        return out.movedim(batch_dim, 0).square().flatten(1).sum(1)

    assert_gradients_match(layers, losses, rehearsed=True)


@pytest.mark.parametrize(
    "shape",
    [
        lambda size: (1, 5, 4),  # shared by the samples
        lambda size: (4,),
        lambda size: (5 * size, 4),  # with the tokens in one dimension, in an order that shapes do not tell
        lambda size: (size, size, 4),
        lambda size: (size, 5, 4) if size == 2 else (5, size, 1, 4),
    ],
)
def test_a_rehearsal_tells_that_no_dimension_is_the_batch(shape: Callable[[int], tuple[int, ...]]) -> None:
    layers = {"a": linear(6, 4, 0), "b": linear(6, 4, 5)}

    def forward(size: int) -> None:
        layers["b"](random_matrix(size, 4))
        layers["a"](random_matrix(*shape(size)))

    with LinearTape(layers, lambda *_: None) as tape:
        assert not tape.rehearse(forward)
        tape.start(5)
        layers["b"](random_matrix(5, 4))
        with pytest.raises(SampleMixingError):
            layers["a"](random_matrix(5, 4))


def test_pieces_that_were_not_rehearsed_are_taken_like_those_that_were() -> None:
    # A model that takes long texts in pieces has more calls for longer ones; here all have their tokens first.
    layers, x = {"a": linear(6, 4, 0)}, random_matrix(3, 9, 4)

    def losses(samples: int = 3, tokens: int = 9) -> Tensor:
        pieces = x[:samples, :tokens].movedim(1, 0).split(3)
        return torch.cat([layers["a"](piece).tanh() for piece in pieces]).movedim(1, 0).square().sum((1, 2))

    expected = weight_gradients(layers, losses)
    records: list[tuple[Tensor, Tensor]] = []
    with LinearTape(layers, lambda _, x, g: records.append((x, g))) as tape:
        assert tape.rehearse(lambda samples: losses(samples, tokens=3))
        tape.start(3)
        losses().sum().backward()
        tape.finish()
    ((seen, gradient),) = records
    for d, gradients in enumerate(expected):
        torch.testing.assert_close(gradient[d].mT @ seen[d], gradients["a"], rtol=1e-5, atol=1e-5)


def test_hooks_are_gone_afterwards_also_after_an_error() -> None:
    layer = linear(4, 4, 0)
    with LinearTape({"a": layer}, lambda *_: None):
        assert layer._forward_hooks
    assert not layer._forward_hooks
    with pytest.raises(RuntimeError, match="inside"), LinearTape({"a": layer}, lambda *_: None):
        raise RuntimeError("inside")
    assert not layer._forward_hooks


def test_a_forward_pass_that_was_given_up_leaves_nothing_for_the_next() -> None:
    layers, x = {"a": linear(4, 4, 0)}, random_matrix(3, 5, 4)
    records: list[Tensor] = []
    with LinearTape(layers, lambda _, x, g: records.append(x)) as tape:
        tape.start(3)
        layers["a"](x + 1)  # no backward pass
        tape.start(3)
        layers["a"](x).sum().backward()
        tape.finish()
    assert len(records) == 1
    assert torch.equal(records[0], x)


@pytest.mark.parametrize("hide", ["no_grad", "reentrant"])
def test_a_layer_that_is_only_called_without_gradients_is_refused_by_name(hide: str) -> None:
    layers = {"first": linear(4, 4, 0), "second": linear(4, 4, 10)}

    def losses(x: Tensor) -> Tensor:
        if hide == "reentrant":  # of what needs no gradient, so the layer is not called again
            hidden = checkpoint(layers["first"], x, use_reentrant=True)
        else:
            with torch.no_grad():
                hidden = layers["first"](x)
        found: Tensor = layers["second"](hidden).square().sum(1)
        return found

    sums: Any = dict.fromkeys(layers, SimpleNamespace(add=lambda x, g: None))
    with (
        Passes(layers, losses, sums) as passes,
        pytest.warns(UserWarning, match="requires_grad") if hide == "reentrant" else nullcontext(),
        pytest.raises(NoGradientError, match=r"^the layer 'first' is only called without"),
    ):
        passes.add(random_matrix(3, 4))


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_under_checkpoints_are_handed_out_once(reentrant: bool) -> None:
    layers, x = {"first": linear(4, 4, 0), "later": linear(4, 4, 10)}, random_matrix(3, 4)

    def losses() -> Tensor:
        hidden: Tensor = layers["first"](x).tanh()
        found: Tensor = checkpoint(layers["later"], hidden, use_reentrant=reentrant).square().sum(1)
        return found

    expected = play(layers, lambda: layers["later"](layers["first"](x).tanh()).square().sum(1))
    found = play(layers, losses)
    for name, ((inputs, gradients),) in expected.items():
        ((x_found, g_found),) = found[name]
        torch.testing.assert_close((x_found, g_found), (inputs, gradients))


def test_a_call_without_gradients_beside_one_with_them_adds_nothing() -> None:
    layers, x = {"a": linear(4, 4, 0)}, random_matrix(3, 4)

    def losses() -> Tensor:
        with torch.no_grad():
            target = layers["a"](x + 1)
        found: Tensor = (layers["a"](x) - target).square().sum(1)
        return found

    ((seen, _),) = play(layers, losses)["a"]
    assert torch.equal(seen, x[:, None])


def test_no_parameter_gets_a_gradient() -> None:
    layers, x = {"a": linear(4, 4, 0)}, random_matrix(3, 5, 4)
    play(layers, lambda: layers["a"](x).sum((1, 2)))
    assert all(parameter.grad is None for parameter in layers["a"].parameters())
