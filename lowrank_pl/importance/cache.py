"""What was measured, on disk, keyed by everything it depends on."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lowrank_pl.files.tensors import write_tensors
from lowrank_pl.importance.identity import identity, own_code, values
from lowrank_pl.importance.importance import Importance, LayerImportance, Measured

logger = logging.getLogger(__name__)

_FORMAT = "5"  # also raised where the same key would give other numbers than before
T = TypeVar("T", bound=LayerImportance)


class ImportanceCache:
    """Files `<key>.safetensors` in one folder.

    Args:
        folder: Where the files lie; made on the first save.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def key(model: nn.Module, names: list[str], kind: str, data_fingerprint: str, loss: str = "") -> str:
        """A digest of what a measurement depends on.

        Of the model, that is its weights, buffers, dtypes, configuration and code: an installed package counts by its
        version, a layer of torch's by its class and arguments, too, a class of the user's by its bytecode and its
        modules' own attributes.

        Args:
            model: The module that is differentiated; a `config` with `to_json_string` counts as part of it.
            names: The layers.
            kind: What was measured, see `Importance.key`.
            data_fingerprint: Identifies samples, order and batches.
            loss: Identifies the loss, its settings and its code; see `identity`.
        """
        digest = hashlib.blake2b(digest_size=16)
        # Others have a `config` of their own, which counts among a module's settings.
        to_json = getattr(getattr(model, "config", None), "to_json_string", None)
        configuration = str(to_json()) if to_json is not None else ""
        of_model = (type(model).__qualname__, identity(own_code(model)), configuration)
        for part in (_FORMAT, *of_model, kind, data_fingerprint, loss, *names):
            digest.update(part.encode() + b"\0")
        for name, tensor in sorted(values(model).items()):
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def load(self, key: str, device: torch.device, importance: Importance[T]) -> Measured[T] | None:
        """Returns what was saved under a key, or `None`; a damaged file counts as absent, with a warning."""
        path = self._path(key)
        try:
            if not path.exists():
                return None
            with safe_open(path, framework="pt", device=str(device)) as file:
                told = file.metadata()
                samples, places = int(told["num_samples"]), json.loads(told["places"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
            layers = {
                name: importance.layer({part: tensors[place] for part, place in parts.items()})
                for name, parts in places.items()
            }
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, OSError) as error:
            logger.warning("ignoring the damaged cache file %s (%s); measuring anew", path, error)
            return None
        return Measured(layers, samples)

    def save(self, key: str, measured: Measured[T]) -> None:
        """Saves under a key; atomic, so that a crash or a second process leaves no half file.

        A tensor that several layers share is written once.

        Raises:
            OSError: the folder cannot be written, or the disk is full; nothing is left behind.
        """
        tensors: dict[str, Tensor] = {}
        places: dict[str, dict[str, str]] = {}
        known: dict[int, str] = {}
        for name, layer in measured.layers.items():
            places[name] = {}
            for part, tensor in layer.tensors().items():
                place = known.setdefault(id(tensor), f"{name}/{part}")
                places[name][part] = place
                if place not in tensors:
                    tensors[place] = tensor
        told = {"num_samples": str(measured.num_samples), "places": json.dumps(places)}
        write_tensors(self._path(key), tensors, told)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"
