import pytest
import torch
from torch import nn

from lowrank_pl.surgery import Exchange, replace_module_
from tests.surgery.encoders import logits, padded_batch, tiny_model


def test_replace_puts_the_new_module_in_place_and_returns_the_old() -> None:
    root = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    old, new = root.get_submodule("1.0"), nn.Identity()
    assert replace_module_(root, "1.0", new) is old
    assert root.get_submodule("1.0") is new
    assert isinstance(root[0], nn.Linear)


def test_replace_keeps_the_order_of_children() -> None:
    root = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    replace_module_(root, "0", nn.Identity())
    assert [type(child) for child in root] == [nn.Identity, nn.Tanh, nn.Linear]


def test_a_module_at_two_names_is_replaced_at_both() -> None:
    shared = nn.Linear(2, 2)
    root = nn.Module()
    root.first = nn.Sequential(shared, nn.Linear(2, 2))
    root.second = nn.ModuleDict({"again": shared})
    new = nn.Identity()
    assert replace_module_(root, "second.again", new) is shared
    assert root.get_submodule("first.0") is new
    assert root.get_submodule("second.again") is new
    assert all(module is not shared for module in root.modules())


def test_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="nope"):
        replace_module_(nn.Sequential(nn.Linear(2, 2)), "nope", nn.Identity())


def test_an_exchange_holds_inside_and_restores_after() -> None:
    model, batch = tiny_model("albert"), padded_batch()
    name = "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn"
    before, present = logits(model, batch), model.get_submodule(name)
    other = nn.Linear(32, 64)
    with Exchange(model, {name: other}):
        assert model.get_submodule(name) is other
        assert not torch.allclose(logits(model, batch), before)
    assert model.get_submodule(name) is present
    assert torch.equal(logits(model, batch), before)


def test_an_exchange_restores_after_an_exception() -> None:
    root = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    present = list(root)
    with pytest.raises(RuntimeError, match="inside"), Exchange(root, {"0": nn.Identity(), "1": nn.Tanh()}):
        raise RuntimeError("inside")
    assert all(now is then for now, then in zip(root, present, strict=True))


def test_an_exchange_restores_when_a_name_is_unknown() -> None:
    root = nn.Sequential(nn.Linear(2, 2))
    present = root[0]
    with pytest.raises(AttributeError, match="nope"), Exchange(root, {"0": nn.Identity(), "nope": nn.Identity()}):
        pass
    assert root[0] is present


def test_an_exchange_restores_a_module_that_was_exchanged_under_two_names() -> None:
    shared = nn.Linear(2, 2)
    root = nn.Sequential(shared, shared)
    with Exchange(root, {"0": nn.Identity(), "1": nn.Tanh()}):
        assert root[1] is not shared
    assert root[0] is root[1] is shared
