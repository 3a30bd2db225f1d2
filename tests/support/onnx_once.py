"""The exporter of ONNX files, asked once for a model: tracing one takes seconds, and copying its file none."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from lowrank_pl.export import onnx_file

Alter = Callable[[onnx.ModelProto], None]


class OnnxOnce:
    """Stands in for `onnx_file._program`: a model of the same class with the same weights is not traced again.

    Args:
        folder: Where files are kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._write = onnx_file._program

    def __call__(self, model: Any) -> Written:
        path = self._folder / f"{fingerprint(model)}.onnx"
        if not path.exists():
            self._write(model).save(path, external_data=False)
        return Written(path)

    def altered(self, alter: Alter) -> Callable[[Any], Written]:
        """An exporter whose files are wrong in some way."""
        return lambda model: Written(self(model).path, alter)


class Written:
    """As much of torch's `ONNXProgram` as an export asks for."""

    def __init__(self, path: Path, alter: Alter | None = None) -> None:
        self.path, self._alter = path, alter

    def save(self, path: Path, external_data: bool) -> None:
        assert not external_data
        if self._alter is None:
            shutil.copy(self.path, path)
            return
        model = onnx.load(str(self.path))
        self._alter(model)
        onnx.save(model, str(path))


def fingerprint(model: Any) -> str:
    """Of everything that the file depends on."""
    found = hashlib.sha256(f"{type(model)} {model.config.to_json_string(use_diff=False)}".encode())
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()
