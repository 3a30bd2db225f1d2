"""Layers that are to be factorised, and what stands against it."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank_pl.errors.base import LowRankError
from lowrank_pl.errors.wording import listed


class NoTargetError(LowRankError):
    """A selection of layers to factorise is empty."""

    def __init__(
        self,
        model: str,
        include: Sequence[str] | None,
        exclude: Sequence[str],
        linears: Sequence[str],
        factored: int,
    ) -> None:
        asked = f"include={list(include)!r}" if include is not None else "the default (linears inside blocks)"
        if factored:
            remedy = (
                f"Its {factored} layers are factorised already: start from the dense model, or train it on "
                "with strategy NoCompression."
            )
        else:
            remedy = "Check model.init_args.strategy.init_args.targets.include and .exclude."
        example = f", e.g. {linears[0]!r}" if linears else ""
        super().__init__(
            f"no nn.Linear in {model} matched {asked}, exclude={list(exclude)!r} "
            f"({len(linears)} linears{example}). {remedy}"
        )


class AlreadyFactorisedError(LowRankError):
    """A model is to be compressed of which a part is factorised already.

    Args:
        model: Its class.
        factorised: Names of the selected layers that are factorised.
        dense: Names of those that are not.
        how: What has factorised them, as far as that is known.
    """

    def __init__(self, model: str, factorised: Sequence[str], dense: Sequence[str], how: str = "") -> None:
        self.model = model
        self.factorised = tuple(factorised)
        self.dense = tuple(dense)
        count, total = len(factorised), len(factorised) + len(dense)
        super().__init__(
            f"{count} of the {total} layers that are to be factorised in {model} are factorised already"
            f"{f' ({how})' if how else ''}, e.g. {factorised[0]!r}: the budget would be a share of what is left. "
            "Allowed are dense layers: start from the dense checkpoint, train it on with strategy NoCompression, "
            "or name what is left, to factorise that alone, in model.init_args.strategy.init_args.targets.include: "
            f"{listed(dense, 3)}."
        )

    def made_by(self, method: str, keep_ratio: float) -> AlreadyFactorisedError:
        """The same, telling by what."""
        how = f"by {method}, keep_ratio {keep_ratio:.4f}"
        return AlreadyFactorisedError(self.model, self.factorised, self.dense, how)


class TiedWeightError(LowRankError):
    """A targeted weight also belongs to another module."""

    def __init__(self, name: str, other: str) -> None:
        super().__init__(
            f"the weight of target {name!r} is tied to {other!r}: factorising one would silently untie them. "
            f"Only untied linears can be factorised. Add {name!r} to "
            "model.init_args.strategy.init_args.targets.exclude."
        )


class VocabularyError(LowRankError):
    """The vocabulary's matrix is to be factorised, and the model does not have it in a way that allows it."""

    def __init__(self, model: str, problem: str) -> None:
        super().__init__(
            f"the vocabulary of {model} cannot be factorised: {problem}. Allowed is an nn.Embedding that "
            "get_input_embeddings() returns, alone or with an nn.Linear of transformers' own that puts out tokens with "
            "the same matrix. Set model.init_args.strategy.init_args.targets.embeddings to false."
        )


class OverrideError(LowRankError):
    """A per-layer override matches nothing or says contradictory things."""

    def __init__(self, pattern: str, problem: str, names: Sequence[str], argument: str = "overrides") -> None:
        super().__init__(
            f"the entry of {argument} for {pattern!r} {problem}. Targeted layers are {listed(names, 3)}. "
            f"Check model.init_args.strategy.init_args.{argument}."
        )


class SeveralDevicesError(LowRankError):
    """The parameters of one model lie on several devices."""

    def __init__(self, model: str, devices: Sequence[str]) -> None:
        super().__init__(
            f"{model} cannot be factorised as it is: its parameters lie on {', '.join(devices)}. Allowed is one "
            "device. Move it there with model.to(…), or load it without a device map."
        )


class HeadError(LowRankError):
    """The head of a model cannot be recalibrated."""

    def __init__(self, model: str, problem: str) -> None:
        super().__init__(
            f"the head of {model} cannot be recalibrated: {problem}. Allowed are classes and values that a linear "
            "layer with a bias puts out. Leave model.init_args.strategy.init_args.recalibration unset."
        )
