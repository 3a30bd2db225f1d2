"""Exchanging modules inside a tree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

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


@contextmanager
def swapped(root: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Exchanges modules for the length of a `with` block and puts the present ones back afterwards."""
    present: list[tuple[str, nn.Module]] = []
    try:
        for name, module in modules.items():
            present.append((name, replace_module_(root, name, module)))
        yield
    finally:
        # Backwards: a module that was exchanged under two names comes back as it was before the first exchange.
        for name, module in reversed(present):
            replace_module_(root, name, module)
