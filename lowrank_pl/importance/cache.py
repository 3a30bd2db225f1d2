"""Fisher information on disk, keyed by everything it depends on."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lowrank_pl.importance.fisher import Fisher, FisherKind, LayerFisher

logger = logging.getLogger(__name__)

_FORMAT = "1"


class FisherCache:
    """Files `<key>.safetensors` in one folder.

    Args:
        folder: Where the files lie; made on the first save.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def key(model: nn.Module, names: list[str], kind: FisherKind, data_fingerprint: str, loss: str = "") -> str:
        """A digest of the weights, dtypes and configuration of the whole model, the layers, the kind and the data.

        Args:
            model: The module that is differentiated; a `config` with `to_json_string` counts as part of it.
            names: The layers.
            kind: What was accumulated.
            data_fingerprint: Identifies samples, order and batches.
            loss: Identifies the loss.
        """
        digest = hashlib.blake2b(digest_size=16)
        config = getattr(model, "config", None)
        configuration = str(config.to_json_string()) if config is not None else ""
        for part in (_FORMAT, type(model).__qualname__, configuration, kind.value, data_fingerprint, loss, *names):
            digest.update(part.encode() + b"\0")
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def load(self, key: str, device: torch.device) -> Fisher | None:
        """Returns what was saved under a key, or `None`; a damaged file counts as absent, with a warning."""
        path = self._path(key)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                samples = int(file.metadata()["num_samples"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
            names = sorted({name.rsplit("/", 1)[0] for name in tensors})
            layers = {
                name: LayerFisher(
                    tensors[f"{name}/input_sums"], tensors[f"{name}/output_sums"], tensors.get(f"{name}/full")
                )
                for name in names
            }
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            logger.warning("ignoring the damaged Fisher cache file %s (%s); measuring anew", path, error)
            return None
        return Fisher(layers, samples)

    def save(self, key: str, fisher: Fisher) -> None:
        """Saves under a key; atomic, so that a crash or a second process leaves no half file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for name, layer in fisher.layers.items():
            tensors[f"{name}/input_sums"] = layer.input_sums.cpu().contiguous()
            tensors[f"{name}/output_sums"] = layer.output_sums.cpu().contiguous()
            if layer.full is not None:
                tensors[f"{name}/full"] = layer.full.cpu().contiguous()
        temporary = self.folder / f".{key}.{os.getpid()}"
        save_file(tensors, temporary, metadata={"num_samples": str(fisher.num_samples)})
        temporary.replace(self._path(key))

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"
