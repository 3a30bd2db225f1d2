"""Compares the memory that factorising a decoder block by block takes with the bound that `inspect` tells beforehand.

Makes a random Llama of the widths asked for in a temporary folder, reads the bound, and runs `compress` in a process
of its own, whose highest memory is read afterwards. What the interpreter and its libraries take is that of `inspect`
on a folder without weights; the activations of one batch are in no bound.

    python benchmarks/bench_block_by_block.py --hidden 2048 --intermediate 5632 --blocks 4 --json memory.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

RECIPE = Path(__file__).parents[1] / "configs" / "recipes" / "causal_lm_kronecker.yaml"
STRATEGY = "--model.init_args.strategy.init_args"
BOUND = re.compile(r"at most ([\d.]+) GiB")


def make(folder: Path, arguments: argparse.Namespace) -> None:
    """The model, its tokenizer and a text."""
    words = {f"w{index}": index for index in range(arguments.vocabulary)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0", eos_token="w1", pad_token="w1")
    for name in ("model", "outline"):
        tokenizer.save_pretrained(folder / name)
    config = LlamaConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.blocks,
        num_attention_heads=arguments.hidden // 64,
        num_key_value_heads=max(arguments.hidden // 512, 1),
        max_position_embeddings=arguments.window,
    )
    config.save_pretrained(folder / "outline")
    torch.manual_seed(0)
    LlamaForCausalLM(config).float().save_pretrained(folder / "model")
    draw, length = random.Random(0), arguments.window * arguments.samples
    for name, tokens in (("train.txt", length), ("valid.txt", arguments.window)):
        text = " ".join(f"w{draw.randrange(2, arguments.vocabulary)}" for _ in range(tokens))
        (folder / name).write_text(text, encoding="utf-8")


def words(verb: str, folder: Path, arguments: argparse.Namespace) -> list[str]:
    """The command line of a verb."""
    return [
        *(sys.executable, "-m", "lowrank_pl", verb, "--config", str(RECIPE)),
        f"--model.init_args.pretrained={folder / ('outline' if verb == 'inspect' else 'model')}",
        f"--data.init_args.train={folder / 'train.txt'}",
        f"--data.init_args.validation={folder / 'valid.txt'}",
        f"--data.init_args.window={arguments.window}",
        "--data.init_args.eval_batch_size=1",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        f"{STRATEGY}.sequential=true",
        f"{STRATEGY}.refit=false",
        f"{STRATEGY}.keep_ratio={arguments.keep_ratio}",
        f"{STRATEGY}.calibration.max_memory={arguments.max_memory}",
        f"{STRATEGY}.calibration.batch_size=1",
        f"{STRATEGY}.calibration.max_samples={arguments.samples}",
        f"{STRATEGY}.calibration.cache=false",
        *([f"--output={folder / 'small'}"] if verb == "compress" else []),
    ]


def run(line: list[str], folder: Path) -> tuple[float, str]:
    """Runs a command; returns its highest memory in GiB and what it printed."""
    log = folder / f"{line[3]}.log"
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(line, cwd=folder, stdout=stream, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    text = log.read_text(encoding="utf-8")
    if status:
        sys.exit(f"{' '.join(line)} failed:\n{text[-2000:]}")
    return usage.ru_maxrss / 2**20, text


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--window", type=int, default=256, help="tokens")
    parser.add_argument("--samples", type=int, default=8, help="windows of calibration")
    parser.add_argument("--keep_ratio", type=float, default=0.8)
    parser.add_argument("--max_memory", type=float, default=0.5, help="GiB of moments at a time")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # In a process of its own: what this one has ever taken would count as taken by those that it starts.
        maker = multiprocessing.get_context("spawn").Process(target=make, args=(folder, arguments))
        maker.start()
        maker.join()
        if maker.exitcode:
            sys.exit("the model was not made, see above")
        libraries, told = run(words("inspect", folder, arguments), folder)
        began = time.monotonic()
        peak, _ = run(words("compress", folder, arguments), folder)
        minutes = (time.monotonic() - began) / 60
    found = BOUND.search(told)
    assert found is not None, told
    figures = {"bound_gib": float(found[1]), "peak_gib": peak, "libraries_gib": libraries, "minutes": minutes}
    shape = f"{arguments.blocks} blocks of {arguments.hidden} x {arguments.intermediate}"
    print(f"{shape}: highest memory {peak:.2f} GiB, of which {libraries:.2f} GiB are libraries")
    print(f"bound without activations: {found[1]} GiB; {minutes:.0f} minutes")
    if arguments.json:
        arguments.json.write_text(json.dumps(vars(arguments) | figures | {"json": str(arguments.json)}, indent=2))


if __name__ == "__main__":
    main()
