"""Models that a run is to learn from."""

from __future__ import annotations

from lowrank_pl.errors.base import LowRankError


class TeacherError(LowRankError):
    """A model that a run cannot learn from."""

    def __init__(self, teacher: str, problem: str, remedy: str) -> None:
        super().__init__(
            f"model.init_args.distillation.init_args.teacher {teacher!r} cannot teach this model: {problem}. {remedy}"
        )

    @classmethod
    def unlearned(cls, source: str) -> TeacherError:
        """The error for `self` where the model's own head is random."""
        return cls(
            "self",
            f"the head of {source!r} is freshly initialised, so there is nothing to learn from it",
            "Fine-tune the dense model first and give its checkpoint as model.init_args.init_from (a resumed run needs "
            "it too) or as teacher.",
        )

    @classmethod
    def of_another_task(cls, teacher: str, kind: str) -> TeacherError:
        """The error for a folder whose model has another head, or none."""
        return cls(
            teacher,
            f"it is a {kind}, without a head for these data",
            "Allowed is a model that has learned them: fine-tune one and give its checkpoint or folder.",
        )

    @classmethod
    def factorised(cls, source: str) -> TeacherError:
        """The error for `self` where the model that the run starts from is factorised already."""
        return cls(
            "self",
            f"{source!r} is factorised already, and a model learns nothing from itself",
            "Give the checkpoint of the dense model as teacher.",
        )

    @classmethod
    def predicts_otherwise(cls, teacher: str, theirs: str, ours: str) -> TeacherError:
        """The error for a teacher of another task."""
        return cls(
            teacher,
            f"it predicts {theirs}, the data ask for {ours}",
            "Allowed is a model of the same kind of target and the same labels in the same order: fine-tune one on "
            "these data.",
        )

    @classmethod
    def reads_otherwise(cls, teacher: str, problem: str) -> TeacherError:
        """The error for a teacher with another tokenizer."""
        return cls(
            teacher,
            f"{problem}, so it would read other words",
            "Allowed is a model with the tokenizer of model.init_args.pretrained.",
        )

    @classmethod
    def reads_less(cls, teacher: str, limit: int, length: int) -> TeacherError:
        """The error for a teacher that cannot read the longest samples."""
        return cls(
            teacher,
            f"it reads {limit} tokens, the samples have up to {length}",
            f"Set data.init_args.max_length: {limit} or less.",
        )

    @classmethod
    def built_otherwise(cls, teacher: str, theirs: str, ours: str) -> TeacherError:
        """The error for hidden states that cannot be compared."""
        return cls(
            teacher,
            f"it has {theirs}, the model that learns {ours}, and hidden_states compares them block by block",
            "Allowed are equal numbers of blocks and features; with hidden_states: 0 the outputs alone are compared.",
        )
