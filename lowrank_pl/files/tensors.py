"""Tensors in a file that is there as a whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowrank_pl.files.durable import flush_names
from lowrank_pl.files.modes import follow_umask


def write_tensors(path: Path, tensors: Mapping[str, Tensor], told: Mapping[str, str] | None = None) -> None:
    """Writes tensors and words about them; at any moment the file is the old one, the new one, or absent.

    Args:
        path: The file; its folder is made.
        tensors: By name; no two are the same.
        told: What else is kept with them.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        save_file({name: _whole(tensor) for name, tensor in tensors.items()}, temporary, dict(told or {}))
        follow_umask(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        flush_names(path.parent)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    finally:
        temporary.unlink(missing_ok=True)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """What `write_tensors` has written, on the CPU; `None` where nothing is there or it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError):
        return None


def _whole(tensor: Tensor) -> Tensor:
    """On the CPU, in memory of its own; copied only where it is a part of another tensor."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
