"""What a run that factorises block by block has done so far, on disk, so that it can be stopped and go on."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from lowrank_pl.errors.outputs import BlocksMismatchError
from lowrank_pl.files.atomic import errors_told
from lowrank_pl.files.tensors import read_tensors, write_tensors

logger = logging.getLogger(__name__)

_FORMAT = "1"
_RUN, _MEASURED, _MOMENTS, _BLOCKS = "run.safetensors", "measured.safetensors", "moments", "blocks"
State = dict[str, Tensor]


def _written(identity: Mapping[str, Any]) -> dict[str, str]:
    return {key: json.dumps(value, sort_keys=True) for key, value in {"format": _FORMAT, **identity}.items()}


class FinishedBlocks:
    """A folder with what was measured, the moments that are still needed, and the factors of every finished block.

    Args:
        folder: Where; `None` keeps nothing but moments.
        on_disk: Whether moments are on disk where there is no folder: in a temporary one, which `close` removes.
    """

    def __init__(self, folder: Path | None, on_disk: bool = False) -> None:
        self._folder = folder
        self._temporary = Path(tempfile.mkdtemp(prefix="lowrank-pl-")) if folder is None and on_disk else None
        self._moments: dict[str, Tensor] = {}

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Notes what the run is, or looks whether it is the one that began here.

        Args:
            identity: What its result depends on, as primitives.

        Raises:
            BlocksMismatchError: the folder belongs to another run; it tells what differs.
            OutputNotWritableError: it cannot be written.
        """
        if self._folder is None:
            return
        self.check(identity)
        if not self.is_begun:
            shutil.rmtree(self._folder / _MOMENTS, ignore_errors=True)  # of a run that has not measured all
            self._write(self._folder / _RUN, {}, _written(identity))

    def check(self, identity: Mapping[str, Any], leaving_out: Collection[str] = ()) -> None:
        """Raises an error where what is kept is another run's; writes nothing.

        Args:
            identity: See `begin`.
            leaving_out: Keys of it that are not compared.

        Raises:
            BlocksMismatchError: see `begin`.
        """
        if self._folder is None or not self.is_begun:
            return
        found, own = read_tensors(self._folder / _RUN), _written(identity)
        theirs = {} if found is None else found[1]
        for key in [*theirs, *own]:
            if key not in leaving_out and theirs.get(key) != own.get(key):
                raise BlocksMismatchError(str(self._folder), key, theirs.get(key), own.get(key))

    @property
    def is_begun(self) -> bool:
        """Whether a run has left anything in the folder that would be of use to it, or somebody has something else."""
        if self._folder is None or not self._folder.exists():
            return False
        # A run that was killed as it wrote one of these files has left that under another name.
        written = tuple(f".{name}." for name in (_RUN, _MEASURED))
        names = {path.name for path in self._folder.iterdir() if not path.name.startswith(written)}
        return bool(names) and not (_RUN in names and names <= {_RUN, _MOMENTS})

    # Moments of output gradients, which are many and large: each is needed once.

    def put_moment(self, name: str, moment: Tensor) -> None:
        """Keeps the moment of a layer.

        Raises:
            OutputNotWritableError: it cannot be written.
        """
        path = self._path_of_moment(name)
        if path is None:
            self._moments[name] = moment
        else:
            self._write(path, {"outputs": moment})

    def has_moment(self, name: str) -> bool:
        """Whether that of a layer is there."""
        path = self._path_of_moment(name)
        return name in self._moments if path is None else path.exists()

    def moment(self, name: str) -> Tensor | None:
        """That of a layer, on the CPU if it was on disk; `None` where there is none."""
        path = self._path_of_moment(name)
        if path is None:
            return self._moments.get(name)
        found = read_tensors(path)
        return None if found is None else found[0]["outputs"]

    def drop_moments(self, names: Sequence[str]) -> None:
        """Forgets those of layers that are done."""
        for name in names:
            self._moments.pop(name, None)
            path = self._path_of_moment(name)
            if path is not None:
                path.unlink(missing_ok=True)

    def _path_of_moment(self, name: str) -> Path | None:
        folder = self._folder or self._temporary
        return None if folder is None else folder / _MOMENTS / f"{name}.safetensors"

    # What was measured, and the blocks.

    def save_measured(self, energies: Mapping[str, Tensor], told: Mapping[str, Any]) -> None:
        """Keeps the energies of all layers and what else was found before ranks are given.

        Raises:
            OutputNotWritableError: it cannot be written.
        """
        if self._folder is not None:
            self._write(self._folder / _MEASURED, energies, {"told": json.dumps(told)})

    def measured(self) -> tuple[State, dict[str, Any]] | None:
        """Inverse of `save_measured`; `None` where it has not been kept."""
        found = None if self._folder is None else read_tensors(self._folder / _MEASURED)
        return None if found is None else (found[0], json.loads(found[1]["told"]))

    def save(self, states: Mapping[str, State], records: Mapping[str, Any]) -> None:
        """Keeps the factors of a block's layers, and their records.

        Raises:
            OutputNotWritableError: they cannot be written.
        """
        if self._folder is None:
            return
        folder = self._folder / _BLOCKS
        index = len(list(folder.glob("*.safetensors"))) if folder.exists() else 0
        tensors = {f"{name}/{key}": tensor for name, state in states.items() for key, tensor in state.items()}
        self._write(folder / f"{index:05}.safetensors", tensors, {"records": json.dumps(records)})

    def load(self) -> tuple[dict[str, State], dict[str, Any]]:
        """Factors and records of all blocks that are finished, in their order."""
        states: dict[str, State] = {}
        records: dict[str, Any] = {}
        folder = None if self._folder is None else self._folder / _BLOCKS
        paths = sorted(folder.glob("*.safetensors")) if folder is not None and folder.exists() else []
        for index, path in enumerate(paths):
            found = read_tensors(path)
            if found is None:
                logger.warning("%s cannot be read: this block and those after it are factorised anew", path)
                for rest in paths[index:]:
                    rest.unlink()
                break
            for place, tensor in found[0].items():
                name, _, key = place.rpartition("/")
                states.setdefault(name, {})[key] = tensor
            records |= json.loads(found[1]["records"])
        return states, records

    def close(self) -> None:
        """Removes what is temporary, and folders that are empty."""
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
        if self._folder is not None:
            for folder in (self._folder / _MOMENTS, self._folder):
                with suppress(OSError):
                    folder.rmdir()

    def _write(self, path: Path, tensors: Mapping[str, Tensor], told: Mapping[str, str] | None = None) -> None:
        with errors_told(self._folder or path.parent):
            write_tensors(path, tensors, told)
