"""What stands in for a linear layer, or for a look-up. m: out_features, n: in_features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from lowrank_pl.core.factors import Factors
from lowrank_pl.core.shapes import LinearShape
from lowrank_pl.errors.checkpoint import FormSpecError, UnknownFormError
from lowrank_pl.nn.view import dense_shape, dense_weight, empty_dense

Spec = dict[str, int | str]
"""What distinguishes two layers of one form and shape, as primitives: `{"rank": 64}`."""

Self = TypeVar("Self", bound="LayerForm")
Linear = TypeVar("Linear", bound="LinearForm")


class LayerForm(nn.Module, ABC):
    """A layer whose weight `W [m, n]` is stored in some other way than as one dense matrix.

    A new form is a subclass in a file of its own, which `lowrank_pl.nn` imports. Its `name` stands in checkpoints, and
    by it the class is found again among the subclasses: there is nothing to register. What a form costs, how it is
    built and how it is brought to the form that is deployed are defined here and nowhere else.

    Attributes:
        name: What the form is called in checkpoints.
        is_final: Whether it is a form to deploy, or one of training that `compact` brings to such a form.
        stands_for: The kind of shape that the layers have in whose place it can be put.
        dense_class: The class of the dense layer that it stands for, such as `nn.Linear` or transformers' `Conv1D`.
    """

    name: ClassVar[str]
    is_final: ClassVar[bool] = True
    stands_for: ClassVar[type[LinearShape]] = LinearShape
    dense_class: type[nn.Module]

    @staticmethod
    def by_name(name: str) -> type[LayerForm]:
        """The form that is called so in checkpoints, found among all subclasses that have been imported.

        Raises:
            UnknownFormError: there is none.
        """
        known = {form.name: form for form in _subclasses(LayerForm) if "name" in vars(form)}
        if name not in known:
            raise UnknownFormError(name, sorted(known))
        return known[name]

    # What a form has to define.

    @abstractmethod
    def spec(self) -> Spec:
        """What `empty` needs to build the like of this layer."""

    @property
    def rank(self) -> int:
        """The rank that `W` has at most."""
        return self.rank_of(self.spec(), self.shape)

    def read_at(self, rank: int) -> None:
        """Says at which rank the present parameters are to be read; for forms of training, whose rank changes.

        Raises:
            RankError: a rank that they have no room for.
        """
        raise NotImplementedError(f"the rank of {type(self).__name__} does not change")

    @abstractmethod
    def product(self) -> Tensor:
        """The dense weight `[m, n]` this layer computes with; gradients flow through it."""

    @abstractmethod
    def assign_(self, factors: Factors) -> None:
        """Writes factors into the existing parameters; the parameter objects stay the same.

        Raises:
            ShapeError: the factors have another shape or rank.
        """

    def assign_like_(self: Self, factors: Factors, other: Self) -> None:
        """`assign_`, with everything that factors leave open decided as in another layer of the same form.

        The parameters of both layers then stand for the same things, so that one may be copied or averaged into the
        other. Two factors leave nothing open.
        """
        del other
        self.assign_(factors)

    @classmethod
    @abstractmethod
    def rank_of(cls, spec: Mapping[str, Any], shape: LinearShape) -> int:
        """The rank that a layer's weight has at most."""

    @classmethod
    @abstractmethod
    def parameters_of(cls, spec: Mapping[str, Any], shape: LinearShape) -> int:
        """Parameters of a layer, without bias."""

    @classmethod
    def flops_of(cls, spec: Mapping[str, Any], shape: LinearShape) -> int:
        """Floating-point operations per token, without bias: two per parameter, unless a form says otherwise."""
        return 2 * cls.parameters_of(spec, shape)

    @classmethod
    @abstractmethod
    def product_of(cls, state: Mapping[str, Tensor]) -> Tensor:
        """`product` from a layer's state dict alone."""

    @classmethod
    def deployed(cls, state: Mapping[str, Tensor]) -> Deployed | None:
        """The final form of what a layer's state dict holds; a form of training says which. `None`: a dense layer.

        Everything that compacts, a module, a state dict or a layout, does it by this.
        """
        raise NotImplementedError(f"{cls.__name__} is_final, or tells its final form in deployed()")

    @classmethod
    def bias_of(cls, state: Mapping[str, Tensor]) -> Tensor | None:
        """The bias from a layer's state dict alone."""
        return state.get("bias")

    @property
    @abstractmethod
    def shape(self) -> LinearShape:
        """The shape of the dense weight this layer stands for."""

    @classmethod
    @abstractmethod
    def empty(cls: type[Self], spec: Mapping[str, Any], like: nn.Module) -> Self:
        """A layer to be filled, in the place of another one.

        Args:
            spec: As `spec` returns it.
            like: A dense layer or any form: its features, bias (with values), device, dtype, mode and `requires_grad`
                are kept.

        Raises:
            FormSpecError, RankError: the spec is none of this form, or not possible for the shape.
        """

    @abstractmethod
    def empty_dense(self) -> nn.Module:
        """The dense layer that this one stands for, of the architecture's own class; only the bias has its values."""

    # What follows from it.

    @property
    def reference(self) -> nn.Parameter:
        """The parameter that device, dtype and `requires_grad` of the weight are read off."""
        return next(self.parameters())

    @torch.no_grad()
    def dense(self) -> nn.Module:
        """The dense layer of the same function."""
        made = self.empty_dense()
        dense_weight(made).copy_(self.product())
        return made

    @torch.no_grad()
    def compact(self) -> nn.Module:
        """The deployed form of this layer, with new parameters; the layer itself where it is one."""
        if self.is_final:
            return self
        final = self.deployed(self.state_dict())
        if final is None:
            return self.dense()
        made = final.form.empty(final.spec, self)
        made.load_state_dict(final.state)
        return made

    @classmethod
    def compact_state(cls, state: Mapping[str, Tensor], name: str) -> Deployed | None:
        """What `compact` would make of the layer `name` of a model, from the model's state dict."""
        return cls.deployed(entries_of(state, name))

    @classmethod
    def dense_state(cls, state: Mapping[str, Tensor], name: str, transposed: bool = False) -> dict[str, Tensor]:
        """What `dense` would make of the layer `name` of a model, as the state dict of an `nn.Linear`.

        Args:
            state: The model's.
            name: The layer's.
            transposed: For a dense layer that stores its weight as `[n, m]`.
        """
        own = entries_of(state, name)
        bias, product = cls.bias_of(own), cls.product_of(own)
        weight = product.mT.contiguous() if transposed else product
        return {"weight": weight, **({} if bias is None else {"bias": bias})}


class LinearForm(LayerForm):
    """`y = W x + bias`, with a `W [m, n]` that is stored in some other way than as one dense matrix.

    Attributes:
        in_features: n.
        out_features: m.
    """

    in_features: int
    out_features: int

    if TYPE_CHECKING:  # a parameter of this name could not be registered where the class had the property

        @property
        def bias(self) -> nn.Parameter | None:
            """The bias `[m]`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.dense_class = nn.Linear

    @classmethod
    @abstractmethod
    def build(
        cls: type[Linear],
        spec: Mapping[str, Any],
        shape: LinearShape,
        bias: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Linear:
        """A layer filled with zeros.

        Raises:
            FormSpecError, RankError: the spec is none of this form, or not possible for the shape.
        """

    @property
    def shape(self) -> LinearShape:
        """The shape of the dense weight this layer stands for."""
        return LinearShape(self.out_features, self.in_features)

    @classmethod
    def empty(cls: type[Linear], spec: Mapping[str, Any], like: nn.Module) -> Linear:
        """A layer to be filled, in the place of another one.

        Args:
            spec: As `spec` returns it.
            like: A dense layer or any form: its features, bias (with values), device, dtype, mode and `requires_grad`
                are kept.

        Raises:
            FormSpecError, RankError: see `build`.
        """
        reference = reference_of(like)
        made = cls.build(spec, shape_of(like), like.bias is not None, reference.device, reference.dtype)
        made.dense_class = like.dense_class if isinstance(like, LinearForm) else type(like)
        take_over_(made, like)
        return made

    def empty_dense(self) -> nn.Module:
        """The dense layer that this one stands for, of the architecture's own class; only the bias has its values."""
        made = empty_dense(
            self.dense_class, self.shape, self.bias is not None, self.reference.device, self.reference.dtype
        )
        take_over_(made, self)
        return made


@dataclass(frozen=True)
class Deployed:
    """A layer in its final form, apart from any module.

    Attributes:
        form: Which.
        spec: Of the layer.
        state: Its state dict.
    """

    form: type[LayerForm]
    spec: Spec
    state: dict[str, Tensor]


def shape_of(layer: nn.Module) -> LinearShape:
    """The shape of the weight of a dense layer or of a form."""
    return layer.shape if isinstance(layer, LayerForm) else dense_shape(layer)


def reference_of(layer: nn.Module) -> Tensor:
    """The parameter that device, dtype and `requires_grad` of a dense layer's or a form's weight are read off."""
    return layer.reference if isinstance(layer, LayerForm) else dense_weight(layer)


def outside_forms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules`, but for what lies inside a form: the linears in it are its own affair."""
    inside: str | None = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        yield name, module
        if isinstance(module, LayerForm):
            inside = f"{name}." if name else ""


def forms_in(model: nn.Module) -> dict[str, LayerForm]:
    """Every form in a model by its fully qualified name; one with several names under its first."""
    return {name: module for name, module in outside_forms(model) if isinstance(module, LayerForm)}


def forms_in_training(model: nn.Module) -> dict[str, LayerForm]:
    """Those among `forms_in` that are still to be brought to the form that is deployed."""
    return {name: form for name, form in forms_in(model).items() if not form.is_final}


def entries_of(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The entries of one module in a model's state dict, by their names inside the module."""
    prefix = f"{name}." if name else ""
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def whole_number(form: str, spec: Mapping[str, Any], key: str) -> int:
    """A number out of a spec.

    Raises:
        FormSpecError: it is missing, or no whole number.
    """
    value = spec.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise FormSpecError({"form": form, **spec}, f"the whole number {key!r}")
    return value


@torch.no_grad()
def take_over_(made: nn.Module, like: nn.Module) -> None:
    """Copies the bias, and gives weights and bias the flags of those that they stand in for."""
    made.requires_grad_(reference_of(like).requires_grad)
    own, given = getattr(made, "bias", None), getattr(like, "bias", None)
    if isinstance(own, nn.Parameter) and isinstance(given, nn.Parameter):
        own.copy_(given)
        own.requires_grad_(given.requires_grad)
    made.train(like.training)


def _subclasses(form: type[Any]) -> Iterator[type[LayerForm]]:
    for subclass in form.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)
