"""Learning from a teacher besides the labels: what is asked for, and the loss that follows."""

from __future__ import annotations

import math
from typing import Any

from lowrank_pl.errors.numerics import RangeError

SELF = "self"
"""The teacher that is the model itself, before it is factorised."""


class Distillation:
    """A teacher for training, on top of any strategy: `labels · task + logits · D + hidden_states · H`.

    `D` compares outputs: `τ² KL(softmax(teacher / τ) ‖ softmax(student / τ))` for classes, per token where labels
    count; the squared error for values. `H` is the mean squared error of the hidden states after each block, over
    tokens that are no padding. The teacher is in eval mode and costs a forward pass without gradient per step.
    `val/loss` stays the task's.

    Args:
        teacher: A Lightning checkpoint of this package, the output folder of `compress`, an exported or Hugging Face
            folder, or `pkg://…`; `self` is the model before it is factorised, as `init_from` brings it.
        temperature: `τ > 0`; without effect on values.
        logits: Weight of `D`, `>= 0`.
        hidden_states: Weight of `H`, `>= 0`; above 0 the teacher needs as many blocks, as wide as the student's.
        labels: Weight of the task's own loss, `>= 0`.
        cache: Ask the teacher once per training sample, before the first step, and keep its logits in memory. They are
            found again by the tokens of a sample, so not for masked language modelling, where these change, nor for
            decoders, whose logits of all tokens fill the memory; hidden states, a hundred times as many numbers, are
            not kept either.

    References:
        Hinton, Vinyals and Dean, Distilling the knowledge in a neural network, 2015, section 2 (logits); Jiao et al.,
        TinyBERT, Findings of EMNLP 2020, section 3.1 (hidden states, there with a projection).
    """

    def __init__(
        self,
        teacher: str = SELF,
        temperature: float = 2.0,
        logits: float = 1.0,
        hidden_states: float = 10.0,
        labels: float = 1.0,
        cache: bool = False,
    ) -> None:
        if not (math.isfinite(temperature) and temperature > 0):
            raise RangeError("distillation.temperature", temperature, "temperature > 0")
        for name, weight in (("logits", logits), ("hidden_states", hidden_states), ("labels", labels)):
            if not (math.isfinite(weight) and weight >= 0):
                raise RangeError(f"distillation.{name}", weight, "a weight of 0 or more")
        if logits == 0 and labels == 0:
            allowed = "more than 0 for it or for labels: hidden states alone do not train the head"
            raise RangeError("distillation.logits", logits, allowed)
        if cache and hidden_states > 0:
            allowed = "false where hidden_states is above 0: only logits are kept. Set distillation.hidden_states: 0"
            raise RangeError("distillation.cache", cache, allowed)
        self.teacher = teacher
        self.temperature = temperature
        self.logits = logits
        self.hidden_states = hidden_states
        self.labels = labels
        self.cache = cache

    @property
    def needs_teacher(self) -> bool:
        """Whether anything of a teacher has a weight."""
        return self.logits > 0 or self.hidden_states > 0

    def options(self) -> dict[str, Any]:
        """What identifies it in reports and checkpoints, as primitives."""
        return dict(vars(self))
