"""The verb `evaluate`: decoders on tasks of lm-evaluation-harness."""

from __future__ import annotations

import gc
import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from lowrank_pl import __version__
from lowrank_pl.benchmark.request import check_device, check_names, labels
from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.evaluation.models import check_model, load, only_finite
from lowrank_pl.evaluation.results import Results, scores_of
from lowrank_pl.evaluation.tasks import check_packages, load_tasks
from lowrank_pl.files import OutputFolder
from lowrank_pl.files.command import command_line

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def evaluate(
    models: list[str],
    tasks: list[str],
    output: str,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | float | None = None,
    batch_size: int = 8,
    device: str = "cpu",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    tokenizer: str | None = None,
) -> Path:
    """Scores decoders on tasks of lm-evaluation-harness, which asks, answers and counts; needs the extra `lm-eval`.

    Models are loaded as everywhere in this package, one after the other, and given to the harness's own `HFLM`.
    Results of a model are written as soon as it is done.

    Args:
        models: Checkpoints, output folders of `compress`, exported folders, or dense models as `pretrained` names them.
        tasks: Names of tasks, groups or tags, e.g. `piqa arc_easy`. Their data come from the hub or its cache.
        output: A new or empty folder: report.json and report.md.
        include_path: A folder with task files (YAML) of your own, whose data may be local files.
        num_fewshot: Solved examples before every question; by default each task's own number. A task that fixes 0
            keeps it.
        limit: So many questions of every task at most, or a share of them below 1; for trying things out.
        batch_size: Texts per call of the model.
        device: `cpu`, `cuda`, `cuda:1`, …
        dtype: Of the weights.
        tokenizer: Where the tokenizer of all models is; by default each model's own.

    Returns:
        The folder.

    Raises:
        MissingPackagesError: the harness is not installed.
        OutputExistsError, OutputNotWritableError: see `output`.
        RangeError: an impossible number, or more examples than a task has.
        MissingArgumentError: no model or task, one named twice, a device that is not there, no folder `include_path`,
            or a checkpoint that does not tell its tokenizer.
        NotALanguageModelError: an encoder, or a model without a head for tokens.
        NonFiniteScoreError: a model puts out NaN.
        UnknownHarnessTaskError, TaskDataError, TaskUnusableError: a task is not known, has no data, or cannot be run.
        NotACheckpointError, ModelFolderError, HubUnreachableError, PackageModelError, CheckpointMismatchError,
            TextStartError: a model or a tokenizer cannot be read or used.
    """
    check_packages()
    folder = OutputFolder(output)
    folder.check()
    check_names({"models": models, "tasks": tasks})
    _check_numbers(num_fewshot, limit, batch_size)
    check_device(device)
    words = {label: check_model(path, tokenizer) for label, path in labels(models).items()}
    asked = load_tasks(tasks, include_path, num_fewshot)
    results = Results(
        {
            "lm_eval": version("lm_eval"),
            "device": device,
            "dtype": dtype,
            "batch_size": batch_size,
            "num_fewshot": num_fewshot,
            "limit": limit,
            "include_path": include_path,
            "lowrank_pl": __version__,
            **{name: version(name) for name in ("torch", "transformers", "datasets")},
            "models": labels(models),
            "command": command_line(),
        }
    )
    for label, path in labels(models).items():
        model = load(path, _DTYPES[dtype], device)
        results.parameters[label] = model.num_parameters()
        with only_finite(model, label):
            found = _ask(model, words[label], asked, num_fewshot, limit, batch_size)
        results.tasks[label] = scores_of(found)
        results.save(folder.begun())
        del model
        gc.collect()  # two of a size that fills a device do not fit on it
    print(results.to_markdown())
    return folder.path


def _check_numbers(num_fewshot: int | None, limit: int | float | None, batch_size: int) -> None:
    if num_fewshot is not None and num_fewshot < 0:
        raise RangeError("num_fewshot", num_fewshot, "0 or more, or null for each task's own number")
    if limit is not None and not (0 < limit < 1 or (limit >= 1 and limit == int(limit))):
        raise RangeError("limit", limit, "a whole number from 1, a share above 0 and below 1, or null for all")
    if batch_size < 1:
        raise RangeError("batch_size", batch_size, "1 or more")


def _ask(
    model: PreTrainedModel,
    words: Any,
    tasks: list[Any],
    num_fewshot: int | None,
    limit: int | float | None,
    batch_size: int,
) -> dict[str, Any]:
    """What the harness finds, with its own seeds: the same questions and examples for every model."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval.models.huggingface").addFilter(_of_use)
    wrapped = HFLM(pretrained=model, tokenizer=words, backend="causal", batch_size=batch_size)
    found = lm_eval.simple_evaluate(
        wrapped,
        tasks=tasks,
        num_fewshot=num_fewshot,
        limit=limit,
        log_samples=False,
        task_manager=TaskManager(include_defaults=False),  # the tasks are read already
    )
    assert found is not None  # as in every process but the first of several
    return dict(found)


_OF_NO_USE = ("kwarg is not of type `str`", "Passed an already-initialized model")


def _of_use(record: logging.LogRecord) -> bool:
    """Leaves out what the harness says to programs that give it a model, and not its name, beside other arguments."""
    return not any(part in str(record.msg) for part in _OF_NO_USE)
