"""`SHA256SUMS` beside exported weights: a flipped bit gives other numbers, and nothing else would show it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from lowrank_pl.errors.checkpoint import DamagedWeightsError

CHECKSUMS = "SHA256SUMS"
_WEIGHTS = ("model*.safetensors", "model*.safetensors.index.json", "model.onnx*")
_LINE = re.compile(r"(?P<digest>[0-9a-fA-F]{64}) [ *](?P<name>.+)")
_CHUNK = 1 << 20


def write_checksums(folder: Path) -> None:
    """Writes `SHA256SUMS` over the weights of a folder and their index, so that `sha256sum -c SHA256SUMS` works."""
    files = sorted(file for pattern in _WEIGHTS for file in folder.glob(pattern))
    lines = [f"{_digest(file)}  {file.name}\n" for file in files]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8", newline="\n")


def verify_checksums(folder: Path, names: Iterable[str]) -> None:
    """Compares files with `SHA256SUMS`, where the folder has one; its lines about other files do not matter.

    Args:
        folder: Where the files lie.
        names: The files that are about to be read.

    Raises:
        DamagedWeightsError: a file is not the one that was exported, or `SHA256SUMS` does not list it.
    """
    if not (folder / CHECKSUMS).is_file():
        return
    # Undecodable bytes make their line unreadable, and the file of that line then counts as not listed.
    lines = (folder / CHECKSUMS).read_text(encoding="utf-8", errors="replace").splitlines()
    matches = [match for line in lines if (match := _LINE.fullmatch(line))]
    listed = {match["name"]: match["digest"].lower() for match in matches}
    for name in names:
        found = _digest(folder / name)
        if listed.get(name) != found:
            raise DamagedWeightsError(str(folder / name), found, listed.get(name), CHECKSUMS)


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
