"""Exchanging modules inside a tree."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def replace_module_(root: nn.Module, name: str, replacement: nn.Module) -> nn.Module:
    """Puts a module in the place of another, wherever the tree refers to it, and returns the old one.

    A module that is reachable under several names (shared layers) is replaced under all of them.
    """
    old = root.get_submodule(name)
    for parent in list(root.modules()):
        for child_name, child in parent._modules.items():
            if child is old:
                parent._modules[child_name] = replacement
    return old


class Exchange:
    """Other modules in the places of some of a tree for the length of a `with` block, which may be entered again.

    The places are looked up once, wherever the tree refers to a module; until then nothing is changed.

    Args:
        root: The tree.
        modules: What is put in, by the name of what is taken out.
    """

    def __init__(self, root: nn.Module, modules: Mapping[str, nn.Module]) -> None:
        replacements = {id(root.get_submodule(name)): module for name, module in modules.items()}
        self._places = [
            (parent, name, child, replacements[id(child)])
            for parent in list(root.modules())
            for name, child in parent._modules.items()
            if id(child) in replacements and child is not None
        ]

    def __enter__(self) -> None:
        for parent, name, _, replacement in self._places:
            parent._modules[name] = replacement

    def __exit__(self, *exception: object) -> None:
        for parent, name, child, _ in self._places:
            parent._modules[name] = child
