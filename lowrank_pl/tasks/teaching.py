"""Where a teacher comes from, and whether it can teach: refusals before any long work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from transformers import PreTrainedTokenizerBase

from lowrank_pl.checkpoint import SavedModel, build, read_saved_model, saved_entry
from lowrank_pl.contract import LANGUAGE_MODELLING, TargetSpec
from lowrank_pl.errors.pretrained import HubUnreachableError, ModelFolderError, PackageModelError
from lowrank_pl.errors.run import ResumeMismatchError
from lowrank_pl.errors.teacher import TeacherError
from lowrank_pl.hub import load_config, load_tokenizer, longest_input, resolve_pretrained
from lowrank_pl.surgery import ModelLayout
from lowrank_pl.tasks.distillation import SELF, Distillation
from lowrank_pl.tasks.teacher import Teacher

RESUME_KEY = "lowrank_distillation"
"""Where a checkpoint tells what its run learned from."""


def read_teacher(asked: Distillation) -> SavedModel:
    """The teacher that is asked for by its place.

    Raises:
        NotACheckpointError, DamagedWeightsError, LayoutVersionError: see `read_saved_model`.
        PackageModelError: an installed package does not carry it.
    """
    path = asked.teacher
    return read_saved_model(resolve_pretrained(path) if path.startswith("pkg://") else path, "distillation.teacher")


def load_teacher(
    asked: Distillation,
    made_by: Any,
    student: Any,
    tokenizer: str | None,
    target: TargetSpec | None,
    max_length: int | None = None,
) -> Teacher:
    """The teacher that is asked for by its place, if it can teach.

    Args:
        asked: Where it is, and what of it counts.
        made_by: The Auto class of the model that learns.
        student: The configuration of that model.
        tokenizer: Where its tokenizer is, if that is known.
        target: What the data ask for.
        max_length: Tokens of the longest samples, where the data tell.

    Raises:
        TeacherError: see `check_teacher`; or it cannot read samples that long.
        LowRankError: whatever `read_teacher` and `build` raise.
    """
    saved = read_teacher(asked)
    check_teacher(asked, saved, target, student, tokenizer)
    with isolate_rng():
        model = build(saved, made_by)
    if max_length is not None and max_length > (limit := longest_input(model)):
        raise TeacherError.reads_less(asked.teacher, limit, max_length)
    _tell_lost_token_types(asked.teacher, saved, tokenizer)
    return Teacher(model)


def check_teacher(
    asked: Distillation, saved: SavedModel, target: TargetSpec | None, student: Any, tokenizer: str | None
) -> None:
    """Refuses a teacher of another target, tokenizer or, where hidden states count, shape.

    Args:
        asked: What of it counts.
        saved: The teacher.
        target: What the data ask for, as far as it is known.
        student: The configuration of the model that learns.
        tokenizer: Where its tokenizer is, if that is known.

    Raises:
        TeacherError: it cannot teach.
    """
    if target is not None:
        _check_target(asked.teacher, saved, target)
    if asked.hidden_states > 0:
        theirs, ours = _shape(saved.config), _shape(student)
        if theirs != ours:
            raise TeacherError.built_otherwise(asked.teacher, theirs, ours)
    _check_vocabulary(asked.teacher, saved, student, tokenizer)


def check_can_teach_itself(source: str, layout: ModelLayout, freshly_initialised_head: bool) -> None:
    """Refuses `self` as a teacher of a model that has learned nothing, or is factorised.

    Raises:
        TeacherError: naming what to give instead.
    """
    if layout.modules:
        raise TeacherError.factorised(source)
    if freshly_initialised_head:
        raise TeacherError.unlearned(source)


def check_same_lesson(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Refuses to go on with another teacher, or with other weights of what it says.

    Args:
        theirs: What the run that is resumed has learned from: the options of its `Distillation`, with a digest of the
            teacher's weights in the place of its path; empty without a teacher.
        ours: The same of the run that resumes it.

    Raises:
        ResumeMismatchError: telling the first difference.
    """
    for key in {**theirs, **ours}:
        if theirs.get(key) != ours.get(key):
            told = f"distillation.{key}={theirs.get(key)!r} there, {ours.get(key)!r} here"
            raise ResumeMismatchError.of_teacher(told)


def check_resumed_before_data(asked: Distillation | None, made_by: Any, checkpoint: str) -> None:
    """Refuses what `check_same_lesson` will, as far as it can be told before data are prepared.

    Args:
        asked: Which teacher, and what of it counts.
        made_by: The Auto class of the model that learns.
        checkpoint: What is resumed.

    Raises:
        ResumeMismatchError: see there.
        LowRankError: the checkpoint or the teacher cannot be read.
    """
    theirs = saved_entry(checkpoint, RESUME_KEY) or {}
    if asked is None or not asked.needs_teacher:
        check_same_lesson(theirs, {})
        return
    # The options first: nothing has to be read for them. The weights of `self` are those that the run brings.
    check_same_lesson(theirs, {**asked.options(), "teacher": theirs.get("teacher")})
    if asked.teacher != SELF:
        with isolate_rng():
            teacher = Teacher(build(read_teacher(asked), made_by))
        check_same_lesson(theirs, {**theirs, "teacher": teacher.digest})


def check_before_data(
    asked: Distillation,
    made_by: Any,
    pretrained: str | None,
    init_from: str | None,
    expected: TargetSpec | None,
) -> None:
    """Refuses what can be told before data are prepared.

    Args:
        asked: Which teacher, and what of it counts.
        made_by: The Auto class of the model that learns.
        pretrained: What it starts from, unless it starts from `init_from`.
        init_from: What it starts from.
        expected: What the data ask for, as far as it is known; labels may be missing.

    Raises:
        TeacherError: the teacher cannot teach.
        LowRankError: it cannot be read.
    """
    if not asked.needs_teacher:
        return
    start = None if init_from is None else read_saved_model(init_from)
    if asked.teacher == SELF:
        if start is not None:
            check_can_teach_itself(start.source, start.layout, False)
        elif pretrained is not None:
            check_can_teach_itself(pretrained, ModelLayout({}), _lacks_head(made_by, load_config(pretrained)))
        return
    config = start.config if start is not None else load_config(pretrained) if pretrained is not None else None
    if config is not None:
        tokenizer = pretrained or (start.tokenizer if start is not None else None)
        saved = read_teacher(asked)
        if saved.dense_folder is not None and _lacks_head(made_by, saved.config):
            raise TeacherError.of_another_task(asked.teacher, ", ".join(saved.config.architectures or []))
        check_teacher(asked, saved, expected, config, tokenizer)


def _lacks_head(made_by: Any, config: Any) -> bool:
    """Whether a folder tells that its model has another head than the one that is to be trained, or none."""
    wanted = getattr(getattr(made_by, "_model_mapping", {}).get(type(config), None), "__name__", None)
    return bool(config.architectures) and wanted is not None and wanted not in config.architectures


def _check_target(teacher: str, saved: SavedModel, target: TargetSpec) -> None:
    kind: str
    ours = _told(target.kind, target.label_names)
    if saved.target is not None:
        kind, names = saved.target.kind, saved.target.label_names
    elif target.kind in LANGUAGE_MODELLING:
        return  # a folder whose head does not fit is refused when it is read
    else:
        names = saved.label_names
        problem = getattr(saved.config, "problem_type", None)
        classes = "token_classification" if target.kind == "token_classification" else "classification"
        kind = classes if names else "regression" if problem in (None, "regression") else problem
    theirs = _told(kind, tuple(names))
    if kind != target.kind:
        raise TeacherError.predicts_otherwise(teacher, theirs, ours)
    if not target.label_names:
        return
    unnamed = all(name.startswith("LABEL_") for name in names)
    if len(names) != len(target.label_names) or (names != target.label_names and not unnamed):
        raise TeacherError.predicts_otherwise(teacher, theirs, ours)


def _told(kind: str, names: tuple[str, ...]) -> str:
    return f"{kind} with labels {list(names)}" if names else str(kind)


def _shape(config: Any) -> str:
    return f"{config.num_hidden_layers} blocks of {config.hidden_size} features"


def _check_vocabulary(teacher: str, saved: SavedModel, student: Any, tokenizer: str | None) -> None:
    theirs, ours = (words.get_vocab() for words in both) if (both := _tokenizers(saved, tokenizer)) else ({}, {})
    if theirs != ours:
        differing = min(theirs.items() ^ ours.items(), key=lambda item: item[1])[0]
        raise TeacherError.reads_otherwise(
            teacher,
            f"its tokenizer {saved.tokenizer!r} has {len(theirs)} tokens, that of the model that learns {len(ours)}, "
            f"and they differ in {differing!r}",
        )
    sizes = saved.config.vocab_size, student.vocab_size
    if sizes[0] != sizes[1]:
        raise TeacherError.reads_otherwise(teacher, f"it has {sizes[0]} tokens and the model that learns {sizes[1]}")


def _tell_lost_token_types(teacher: str, saved: SavedModel, tokenizer: str | None) -> None:
    """Warns of a teacher that is not told which text of a pair a token is in, as it was when it learned."""
    both = _tokenizers(saved, tokenizer)
    if both is None or getattr(saved.config, "type_vocab_size", 2) < 2:
        return
    theirs, ours = ("token_type_ids" in words.model_input_names for words in both)
    if theirs and not ours:
        rank_zero_warn(
            f"distillation.teacher {teacher!r} tells the two texts of a pair apart by token types, which the tokenizer "
            f"{tokenizer!r} does not give: it reads pairs as one text, and predicts worse than it has learned. Single "
            "texts are the same to it."
        )


def _tokenizers(saved: SavedModel, name: str | None) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase] | None:
    """A teacher's and that of the model that learns; none where it is the same one or one of them is not there."""
    if saved.tokenizer is None or name is None or saved.tokenizer == name:
        return None
    try:
        return load_tokenizer(saved.tokenizer), load_tokenizer(name)
    except (HubUnreachableError, ModelFolderError, PackageModelError):
        return None
