"""Evaluation: models that predict no tokens, and tasks of lm-evaluation-harness that cannot be run."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank_pl.errors.base import LowRankError


class NotALanguageModelError(LowRankError):
    """A model that is to be evaluated puts out no next token."""

    def __init__(self, source: str, problem: str) -> None:
        super().__init__(
            f"{source!r} cannot be evaluated: {problem}, and the tasks ask how likely the next tokens of a text are. "
            "Allowed are decoders with their head for tokens, such as Llama, Qwen, Mistral, Gemma, GPT-2, OPT and "
            "Pythia, and checkpoints of the task CausalLM. Check --models; encoders are scored by the verb test."
        )


class TextStartError(LowRankError):
    """A tokenizer has no token that a text could start with."""

    def __init__(self, tokenizer: str) -> None:
        super().__init__(
            f"the tokenizer {tokenizer!r} has neither a bos nor an eos token, and lm-evaluation-harness starts texts "
            "without a context with one. Allowed are tokenizers with one of them, as those of decoders: set bos_token "
            "or eos_token in its tokenizer_config.json, or give another with --tokenizer."
        )


class UnknownHarnessTaskError(LowRankError):
    """A task's name is not among those that were found."""

    def __init__(self, name: str, close: Sequence[str], found: int, include_path: str | None, unread: str) -> None:
        meant = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        own = f"the files *.yaml below --include_path {include_path!r}" if include_path else "no --include_path"
        super().__init__(
            f"no task {name!r} among the {found:,} names of lm-evaluation-harness and {own}{unread}.{meant} Allowed "
            "are tasks, groups and tags: lm_eval ls tasks lists those of the harness, and the key 'task' of a YAML "
            "file names your own."
        )


class TaskDataError(LowRankError):
    """The data of a task are not there."""

    def __init__(self, name: str, reason: str, offline: bool) -> None:
        cause = "HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set, and they are not in the cache" if offline else reason
        super().__init__(
            f"the data of task {name!r} could not be read ({cause}). Allowed are data sets of the hub with network or "
            "in the cache (run the task once with network, then set HF_HUB_OFFLINE=1), and files of your own, which "
            "a task file names under dataset_kwargs.data_files, by whole paths or relative to the working folder; "
            "give its folder with --include_path."
        )


class TaskUnusableError(LowRankError):
    """A task is known and cannot be run."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(
            f"the task {name!r} cannot be run: {problem.rstrip('.')}. Allowed are tasks of text that lm-evaluation-"
            "harness runs without further arguments; mend its YAML file, install what it names, or leave it out of "
            "--tasks."
        )
