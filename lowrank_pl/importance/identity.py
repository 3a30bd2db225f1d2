"""What identifies code and settings, so that a result is found again only where nothing it depends on has changed."""

from __future__ import annotations

import argparse
import enum
import functools
import hashlib
import site
import sys
import sysconfig
import types
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def identity(*parts: Any) -> str:
    """A digest of values, objects, functions and classes, the same in every process that runs the same code.

    Values count by what they are; objects by their class and their attributes; functions by their bytecode, defaults,
    closures and the globals they name, followed as far as code is the user's own. Installed packages count by name and
    version. What cannot be looked into counts by its class alone.

    Args:
        parts: What to identify.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        for token in _Walk().tokens(parts):
            digest.update(token.encode(errors="surrogatepass") + b"\0")
    except RecursionError:
        return uuid.uuid4().hex  # too deep to be looked into: like nothing else
    return digest.hexdigest()


def own_code(module: nn.Module) -> dict[str, Any]:
    """Code and settings of a module tree that its weights do not tell.

    Returns:
        By name, the class of each module and its own attributes; of one from an installed package those that are
        arguments of torch's layers, such as the number of heads, and the version of the package.
    """
    found: dict[str, Any] = {}
    for name, part in module.named_modules():
        kind, own = type(part), settings(part)
        if _is_installed(kind.__module__):
            package = _package(kind.__module__)
            found[f"package {package}"] = _version(kind.__module__)
            # Others, such as transformers, note what changes no result; their configuration counts.
            own = {key: value for key, value in own.items() if package == "torch" and not key.startswith("_")}
        found[name] = (kind, own)
    return found


def settings(module: nn.Module) -> dict[str, Any]:
    """A module's own attributes: neither parameters, buffers and parts nor what every `nn.Module` has."""
    common = vars(nn.Module())
    return {name: value for name, value in vars(module).items() if name not in common}


def values(module: nn.Module, recurse: bool = True) -> dict[str, Any]:
    """Parameters and buffers by name, with those buffers that no checkpoint holds.

    Args:
        module: The module.
        recurse: Whether those of its parts count.
    """
    buffers = module.named_buffers(recurse=recurse, remove_duplicate=False)
    kept = module.state_dict() if recurse else module.named_parameters(recurse=False)
    return {**dict(buffers), **dict(kept)}


_NAMESPACES = (types.SimpleNamespace, argparse.Namespace)


class _Walk:
    """Goes through objects once each, in an order that does not depend on the process."""

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}
        self._kept: list[Any] = []  # an id is free for another object once its own is gone

    def tokens(self, value: Any) -> Iterator[str]:
        """Text that differs where the value does."""
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device, Path)):
            yield f"{type(value).__name__} {value!r}"
        elif isinstance(value, enum.Enum):
            yield f"{type(value).__qualname__}.{value.name}"
        elif id(value) in self._seen:
            yield f"again {self._seen[id(value)]}"
        else:
            self._seen[id(value)] = len(self._seen)
            self._kept.append(value)
            yield from self._compound(value)

    def _compound(self, value: Any) -> Iterator[str]:
        if isinstance(value, Tensor):
            yield f"tensor {value.dtype} {tuple(value.shape)}"
            yield hashlib.blake2b(_bytes(value), digest_size=16).hexdigest()
        elif isinstance(value, (list, tuple)):
            yield f"{type(value).__name__} {len(value)}"
            for item in value:
                yield from self.tokens(item)
        elif isinstance(value, (set, frozenset)):
            yield f"set {len(value)}"
            yield from sorted("\0".join(_Walk().tokens(item)) for item in value)
        elif isinstance(value, Mapping):
            yield f"mapping {len(value)}"
            for key, item in value.items():
                yield from self.tokens(key)
                yield from self.tokens(item)
        elif isinstance(value, types.CodeType):
            yield from self._code(value)
        elif isinstance(value, type):
            yield from self._class(value)
        else:
            yield from self._callable_or_object(value)

    def _callable_or_object(self, value: Any) -> Iterator[str]:
        if isinstance(value, functools.partial):
            yield from self.tokens(("partial", value.func, value.args, value.keywords))
        elif isinstance(value, types.MethodType):
            # Not the object that it is bound to: its class tells its code, and its attributes are looked at elsewhere.
            yield from self.tokens(value.__func__)
        elif isinstance(value, types.FunctionType):
            yield from self._function(value)
        elif isinstance(value, (staticmethod, classmethod)):
            yield from self.tokens(value.__func__)
        elif isinstance(value, property):
            yield from self.tokens((value.fget, value.fset))
        elif isinstance(value, (types.ModuleType, types.BuiltinFunctionType)):
            yield getattr(value, "__name__", "")
        elif isinstance(value, nn.Module):
            yield from self.tokens(("module", type(value), settings(value), values(value), own_code(value)))
        else:
            yield f"object {type(value).__module__}.{type(value).__qualname__}"
            if hasattr(value, "tobytes"):  # an array
                yield hashlib.blake2b(value.tobytes(), digest_size=16).hexdigest()
            # What others' objects hold, such as a logger, is seldom a setting and seldom the same in two processes.
            elif isinstance(value, _NAMESPACES) or not _is_installed(type(value).__module__):
                yield from self.tokens((type(value), _attributes(value)))

    def _class(self, kind: type) -> Iterator[str]:
        for base in kind.__mro__:
            yield f"class {base.__module__}.{base.__qualname__}"
            if _is_installed(base.__module__):
                yield _version(base.__module__)
                continue
            if _package(base.__module__) == _package(__name__):
                yield _version(base.__module__)
            for name, member in sorted(vars(base).items()):
                if name == "__annotations__" and not member:
                    continue  # Python adds them to a class when somebody looks for them
                if name not in ("__dict__", "__weakref__", "__doc__", "__abstractmethods__", "_abc_impl"):
                    yield name
                    yield from self.tokens(member)

    def _function(self, function: types.FunctionType) -> Iterator[str]:
        yield f"function {function.__module__}.{function.__qualname__}"
        if _is_installed(function.__module__ or ""):
            yield _version(function.__module__)
            return
        yield from self.tokens(function.__code__)
        yield from self.tokens((function.__defaults__, function.__kwdefaults__))
        for cell in function.__closure__ or ():
            yield from self.tokens(_content(cell))
        if _package(function.__module__ or "") == _package(__name__):
            return  # this package's functions count when a class has them; what they call changes with its version
        names = _names(function.__code__)
        for name in names:
            if name in function.__globals__:
                value = function.__globals__[name]
                yield f"global {name}"
                yield from self.tokens(value)
                if isinstance(value, types.ModuleType) and not _is_installed(value.__name__):
                    found = [(inner, vars(value)[inner]) for inner in names if inner in vars(value)]
                    yield from self.tokens(found)

    def _code(self, code: types.CodeType) -> Iterator[str]:
        yield code.co_code.hex()
        yield " ".join((*code.co_names, "/", *code.co_varnames, "/", *code.co_freevars))
        for constant in code.co_consts:
            yield from self.tokens(constant)


def _attributes(value: Any) -> dict[str, Any]:
    """What an object holds, in slots too."""
    slots = [vars(kind).get("__slots__", ()) for kind in type(value).__mro__]
    names = [name for slot in slots for name in ((slot,) if isinstance(slot, str) else slot)]
    found = {name: getattr(value, name) for name in names if name != "__weakref__" and hasattr(value, name)}
    return {**found, **getattr(value, "__dict__", {})}


def _names(code: types.CodeType) -> list[str]:
    """Names that a function's code and the code inside it look up."""
    inner = [name for constant in code.co_consts if isinstance(constant, types.CodeType) for name in _names(constant)]
    return sorted({*code.co_names, *inner})


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _package(module: str) -> str:
    return module.partition(".")[0]


def _version(module: str) -> str:
    """The version of the package that a module is part of."""
    return str(getattr(sys.modules.get(_package(module)), "__version__", ""))


@functools.cache
def _is_installed(module: str) -> bool:
    """Whether a module belongs to Python or to an installed package, whose code changes with its version."""
    package = _package(module)
    if package in sys.stdlib_module_names and package != "__main__":
        return True
    file = getattr(sys.modules.get(package), "__file__", None) or getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return package in sys.builtin_module_names
    paths = {*site.getsitepackages(), site.getusersitepackages(), sysconfig.get_path("purelib")}
    return any(Path(file).is_relative_to(path) for path in paths)
