import argparse
import enum
import logging
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers.activations import GELUActivation

from lowrank_pl.importance import identity
from lowrank_pl.importance.identity import own_code, settings
from tests.support.forks import Forks


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Holder:
    def __init__(self, value: Any) -> None:
        self.value = value


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class Buffered(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.register_buffer("value", torch.tensor(value), persistent=False)


class Scaled(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale, self.linear = scale, nn.Linear(2, 2)
        nn.init.ones_(self.linear.weight)
        nn.init.ones_(self.linear.bias)


def closure(value: Any) -> Callable[[], Any]:
    return lambda: value


def cyclic(value: Any) -> list[Any]:
    made: list[Any] = [value]
    made.append(made)
    return made


DIFFERENT: dict[str, Callable[[Any], Any]] = {
    "number": lambda v: v,
    "list": lambda v: [1, v],
    "mapping": lambda v: {"a": v},
    "set": lambda v: {"a", "b", v},
    "tensor": lambda v: torch.tensor([1.0, v]),
    "array": lambda v: torch.tensor([1.0, v]).numpy(),
    "object": Holder,
    "object in an object": lambda v: Holder([Holder(v)]),
    "object with slots": Slotted,
    "namespace": lambda v: SimpleNamespace(a=v),
    "arguments of a command": lambda v: argparse.Namespace(a=v),
    "partial": lambda v: partial(F.cross_entropy, label_smoothing=v),
    "closure": closure,
    "default": lambda v: eval("lambda a=v: a", {"v": v, "__name__": "users"}),
    "constant": lambda v: eval(f"lambda: {v}"),
    "inner constant": lambda v: eval(f"lambda: (lambda: {v})"),
    "global": lambda v: eval("lambda: g", {"g": v, "__name__": "users"}),
    "global function": lambda v: eval("lambda: g()", {"g": closure(v), "__name__": "users"}),
    "class": lambda v: type("Same", (), {"method": closure(v), "__module__": "users"}),
    "base class": lambda v: type("Same", (type("Base", (), {"a": v, "__module__": "users"}),), {"__module__": "users"}),
    "module": Scaled,
    "module of torch": lambda v: nn.CrossEntropyLoss(label_smoothing=v),
    "module of torch in a module": lambda v: nn.ModuleList([nn.CrossEntropyLoss(label_smoothing=v)]),
    "buffer that no checkpoint holds": Buffered,
    "cycle": cyclic,
}


@pytest.mark.parametrize("make", DIFFERENT.values(), ids=DIFFERENT)
def test_equal_things_are_one_and_different_ones_are_not(make: Callable[[Any], Any]) -> None:
    assert identity(make(0.25)) == identity(make(0.25)) != identity(make(0.5))


def test_types_order_and_nesting_count() -> None:
    values: list[Any] = [1, 1.0, "1", True, None, [1], (1,), {1}, {1: 1}, [[1]], [1, 1], Colour.RED, Colour.BLUE, b"1"]
    values += [torch.float16, torch.bfloat16, F.gelu, F.relu, nn.ReLU, nn.GELU, torch.ones(1), torch.ones(1).double()]
    assert len({identity(value) for value in values}) == len(values)


def test_what_cannot_be_looked_into_does_not_differ_between_runs() -> None:
    # A default repr tells the address, a logger holds the process's handlers.
    assert identity(object()) == identity(object())
    assert identity(logging.getLogger("a")) == identity(logging.getLogger("b"))


def test_what_is_too_deep_is_like_nothing_else() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    assert identity(deep) != identity(deep)


def test_code_of_a_model_is_that_of_its_classes_with_their_settings_and_the_versions_of_packages() -> None:
    model = nn.Sequential(Scaled(2.0), nn.ReLU(), GELUActivation())
    assert own_code(model) == {
        "package torch": torch.__version__,
        "package transformers": transformers.__version__,
        "": (nn.Sequential, {}),
        "0": (Scaled, {"scale": 2.0}),
        "0.linear": (nn.Linear, {"in_features": 2, "out_features": 2}),
        "1": (nn.ReLU, {"inplace": False}),
        "2": (GELUActivation, {}),
    }
    assert settings(model.eval()) == {}


SCRIPT = """
    import sys
    sys.dont_write_bytecode = True  # variants have the same size and may have the same time
    from lowrank_pl import tasks
    from lowrank_pl.importance import identity
    print(hash("strings"))
    for folder in {folders!r}:
        sys.path.insert(0, folder)
        import users
        print(identity(users.Task, users.Task("mean")))
        del sys.path[0], sys.modules["users"], sys.modules["helpers"]
    print(identity(tasks.MaskedLM))
"""
USERS = """
    import logging
    from torch import nn
    import helpers
    logger = logging.getLogger(__name__)
    NAMES = {{"mean", "sum", "none", "median"}}
    class Task(nn.Module):
        def __init__(self, kind):
            super().__init__()
            assert kind in {{"a", "b", "mean"}}
            self.kind = kind
        def losses(self, logits, labels):
            logger.info("losses")
            return helpers.scaled(logits) if self.kind in NAMES else {body}
"""
HELPERS = """
    FACTOR = {factor}
    def scaled(x):
        return FACTOR * x
"""


VARIANTS = {"as it is": ("0", 2), "other body": ("1", 2), "other constant": ("0", 3)}


def in_a_process(forks: Forks, where: Path) -> list[str]:
    """The hash of a string, then identities of every variant and of a task of this package, found by a new process."""
    folders = []
    for name, (body, factor) in VARIANTS.items():
        folder = where / name
        folder.mkdir(parents=True)
        (folder / "users.py").write_text(textwrap.dedent(USERS.format(body=body)), encoding="utf-8")
        (folder / "helpers.py").write_text(textwrap.dedent(HELPERS.format(factor=factor)), encoding="utf-8")
        folders.append(str(folder))
    script = textwrap.dedent(SCRIPT.format(folders=folders))
    return forks.run(["-c", script], where).split()


def test_code_is_found_again_in_another_process_unless_it_has_changed(
    everything_loaded: Forks, transformers_loaded: Forks, tmp_path: Path
) -> None:
    # Both are new: in this one other tests may have changed what the classes of this package refer to. They differ in
    # the seed of hashes, and in what they have imported before.
    order, *first = in_a_process(everything_loaded, tmp_path / "a")
    other_order, *second = in_a_process(transformers_loaded, tmp_path / "b")
    assert order != other_order
    assert len(set(first)) == len(VARIANTS) + 1
    assert second == first


def test_looking_at_a_class_does_not_change_it() -> None:
    class Owner:
        def loss(self) -> int:
            return 1

    before = identity(Owner)
    assert Owner.__annotations__ == {}
    assert identity(Owner) == before
