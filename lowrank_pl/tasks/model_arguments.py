"""The `model` part of a command line as a checkpoint contains it, so that it need not be given again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lowrank_pl.checkpoint import read_saved_model
from lowrank_pl.tasks.causal_lm import CausalLM
from lowrank_pl.tasks.masked_lm import MaskedLM
from lowrank_pl.tasks.sequence_classification import SequenceClassification
from lowrank_pl.tasks.token_classification import TokenClassification

_OPTION = "--ckpt_path"
_TASKS = (SequenceClassification, TokenClassification, MaskedLM, CausalLM)


def model_arguments(words: Sequence[str]) -> list[str]:
    """The task and the tokenizer of the checkpoint that a command line names, as arguments to be put before its own.

    Args:
        words: The arguments of a verb.

    Returns:
        `--model` and `--model.init_args.pretrained`; nothing without a `--ckpt_path` that is a file.

    Raises:
        NotACheckpointError, LayoutVersionError: the file is no checkpoint of this package.
    """
    path = _given(words)
    if path is None or not Path(path).expanduser().is_file():
        return []
    saved = read_saved_model(path, _OPTION)
    if saved.target is None:
        return []
    task = next(task for task in _TASKS if saved.target.kind in task.kinds)
    found = [f"--model={task.__name__}"]
    return found if saved.tokenizer is None else [*found, f"--model.init_args.pretrained={saved.tokenizer}"]


def _given(words: Sequence[str]) -> str | None:
    path = None
    for word, following in zip(words, [*words[1:], None], strict=True):
        if word == _OPTION:
            path = following
        elif word.startswith(f"{_OPTION}="):
            path = word.removeprefix(f"{_OPTION}=")
    return path
