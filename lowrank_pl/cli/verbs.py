"""Which verbs there are, for the help and for typing errors: known without loading anything."""

from __future__ import annotations

from difflib import get_close_matches

PROGRAM = "lowrank-pl"

VERBS = {
    "fit": "train, with the strategy's part in it; --ckpt_path resumes",
    "validate": "score a model on the validation split",
    "test": "score a model on the test split",
    "predict": "predict the unlabelled split",
    "compress": "score, factorise without a training step, score again",
    "diagnose": "show per layer which method suits it and what that gains",
    "inspect": "show what can be factorised and what a budget would give; no data, no training",
    "export": "write a checkpoint as a Hugging Face folder or an ONNX file",
    "evaluate": "score decoders on tasks of lm-evaluation-harness",
    "benchmark": "time models and layers on your shapes",
}


def overview() -> str:
    """What `lowrank-pl --help` prints."""
    width = max(map(len, VERBS)) + 2
    lines = [f"  {verb.ljust(width)}{text}" for verb, text in VERBS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} VERB [--config FILE …] [options]",
            "",
            "Low-rank compression of Hugging Face encoders. Runs are YAML files, and every key of them is an option.",
            "",
            "verbs:",
            *lines,
            "",
            f"`{PROGRAM} VERB --help` shows a verb's options, `--print_config` behind a verb what it would use.",
            f"`{PROGRAM} --version` shows the version. LOWRANK_PL_DEBUG=1 shows the traceback of every error.",
        ]
    )


def unknown_verb(word: str) -> str:
    """What is said about a first word that is no verb."""
    close = get_close_matches(word.lower(), VERBS, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{PROGRAM}: no verb {word!r}; there are {', '.join(VERBS)}.{hint} See `{PROGRAM} --help`."
