"""What an optimizer, or its state, does not allow."""

from __future__ import annotations

from lowrank_pl.errors.base import LowRankError


class OptimizerArgumentsError(LowRankError):
    """An optimizer rejects its arguments."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"the optimizer refuses its arguments: {reason.strip().rstrip('.')}. Check model.init_args.optimizer."
        )


class OptimizerCoverageError(LowRankError):
    """The optimizer lacks trainable parameters of the model."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(
            f"the optimizer does not hold {len(names)} trainable parameters, e.g. {names[0]!r}: they would never be "
            "updated. Every parameter with requires_grad must be in it; freeze what should not train, and build the "
            "optimizer in configure_optimizers, after configure_model."
        )


class OptimizerStateError(LowRankError):
    """An optimizer keeps something of a layer that cannot be divided among its singular groups."""

    def __init__(self, optimizer: str, name: str, shape: str) -> None:
        super().__init__(
            f"{optimizer} keeps {name!r} of shape {shape} for the factors, of which nobody can say which part "
            "belongs to which singular group. Allowed are optimizers whose state has the shape of the parameter or "
            "is a single number, such as AdamW, Adam, SGD, RMSprop, Lion. Set model.init_args.optimizer to one."
        )


class UnknownOptimizerStateError(LowRankError):
    """An optimizer keeps something of a layer that may be neither an average of gradients nor of their sizes."""

    def __init__(self, optimizer: str, name: str) -> None:
        super().__init__(
            f"{optimizer} keeps {name!r} of every weight, and nobody can say what becomes of it when a layer gets new "
            "factors. Known are the averages of gradients and of their squares that AdamW, Adam, Adamax, NAdam, RAdam, "
            "SGD, RMSprop, Adagrad, Adadelta and Lion keep, by the names that they have in torch. Set "
            "model.init_args.optimizer to one of these, or model.init_args.strategy.init_args.sensitivity to "
            "FirstOrder, whose groups take along whatever has the shape of the parameter."
        )


class HiddenOptimizerStateError(LowRankError):
    """An optimizer keeps its state of a layer where it cannot be moved along with the layer's groups."""

    def __init__(self, optimizer: str) -> None:
        super().__init__(
            f"{optimizer} has taken steps, yet it shows no state for some of the factors it updates, while it keeps "
            "some elsewhere: momentum would end up at other singular groups. Allowed are optimizers, and wrappers "
            "around one torch optimizer, whose `state` holds every parameter. Set model.init_args.optimizer to one."
        )
