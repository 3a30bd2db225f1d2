"""Linear layers in eight bits: torchao's tensors in a model, plain numbers and their scales in its file."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lowrank_pl.errors.checkpoint import CheckpointMismatchError, QuantizedModelError
from lowrank_pl.errors.export import QuantizationError
from lowrank_pl.errors.run import MissingPackagesError
from lowrank_pl.nn import forms_in
from lowrank_pl.surgery import TargetSelector
from lowrank_pl.surgery.targets import TARGETED

logger = logging.getLogger(__name__)

Scheme = Literal["int8_weight_only", "int8_dynamic"]
VERSION = 1
_SCALE = "weight_scale"


def check_torchao(asked: str) -> None:
    """Raises `MissingPackagesError` unless torchao is installed, which computes with these weights."""
    if importlib.util.find_spec("torchao") is None:
        raise MissingPackagesError(asked, ["torchao"], "torchao")


def quantize_(model: nn.Module, scheme: Scheme) -> list[str]:
    """Brings the linear layers of a model's blocks to int8, in place: thin ones and those that stayed dense.

    Every output channel has a scale of its own, symmetric around zero. `int8_weight_only` computes in float;
    `int8_dynamic` also rounds activations, each token by its own scale, and multiplies whole numbers. Embeddings,
    what lies outside the blocks, such as the head, and what multiplies the one number of a rank of 1 stay as they are.
    The model cannot be trained afterwards.

    Args:
        model: In float32, with every factorised layer in its final form.
        scheme: What is in eight bits.

    Returns:
        Names of the layers.

    Raises:
        MissingPackagesError: torchao is not installed.
        QuantizedModelError: it is in eight bits already.
        QuantizationError: a layer is in a form of training, or there is no layer to quantise.
    """
    name = type(model).__name__
    check_torchao("int8 in torch")
    if is_quantized(model):
        raise QuantizedModelError(name, "quantize_")
    layers = _layers(model)
    others = {n: type(m).__name__ for n, m in _dense(model).items() if type(m) is not nn.Linear}
    if others:
        first, kind = next(iter(others.items()))
        told = f"torchao knows nn.Linear, and {len(others)} layers of its blocks are {kind}, such as {first!r}"
        if not layers:
            raise QuantizationError(name, f"{told}; the factors of such a layer are nn.Linear, so factorise it first")
        logger.warning("%s: %s; these stay in float32", name, told)
    if not layers:
        raise QuantizationError(name, "there is no linear layer in its blocks whose weight is its own")
    for layer in layers.values():
        weight = layer.weight.detach()
        layer.weight = nn.Parameter(_torchao().from_hp(weight, **_granularity(), **_activations(scheme)), False)
    return list(layers)


def _layers(model: nn.Module) -> dict[str, nn.Linear]:
    """What is quantised: `nn.Linear` of blocks and in factorised layers, unless the weight is tied or one column."""
    forms = forms_in(model)
    for name, form in forms.items():
        if not form.is_final:
            raise QuantizationError(type(model).__name__, f"its layer {name!r} is still in the form {form.name!r}")
    inside = {f"{name}.{child}": module for name, form in forms.items() for child, module in form.named_modules()}
    # A column alone (what follows a rank of 1) takes more with a scale per row than without, and torchao fails on it.
    found = {n: m for n, m in {**inside, **_dense(model)}.items() if type(m) is nn.Linear and m.in_features > 1}
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(module))
    return {name: module for name, module in found.items() if len(owners[id(module.weight)]) == 1}


def _dense(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of blocks that are not factorised."""
    return {n: model.get_submodule(n) for n, told in TargetSelector().explain(model).items() if told == TARGETED}


def is_int8(tensor: Tensor) -> bool:
    """Whether a tensor is one of torchao's in eight bits."""
    # Not imported for the question: without it there is none.
    found = sys.modules.get("torchao.quantization")
    return found is not None and isinstance(tensor, found.Int8Tensor)


def int8_weights(model: nn.Module) -> dict[str, Any]:
    """The weights in eight bits, by the names of their layers; a layer with several names appears once."""
    return {name.removesuffix(".weight"): value for name, value in model.named_parameters() if is_int8(value)}


def is_quantized(model: nn.Module) -> bool:
    """Whether any layer is in eight bits."""
    return any(is_int8(parameter) for parameter in model.parameters())


def stored_bytes(tensor: Any) -> int:
    """What a tensor takes in memory and in a file; those of torchao tell the size of the float weight."""
    return int(tensor.qdata.nbytes + tensor.scale.nbytes) if is_int8(tensor) else int(tensor.nbytes)


def told_of(model: nn.Module) -> dict[str, Any]:
    """What config.json tells of the layers in eight bits."""
    weights = int8_weights(model)
    dynamic = any(weight.act_quant_kwargs is not None for weight in weights.values())
    scheme: Scheme = "int8_dynamic" if dynamic else "int8_weight_only"
    return {"version": VERSION, "scheme": scheme, "modules": sorted(weights)}


def problem_with(told: Any) -> str:
    """What keeps this release from reading what a config.json tells; empty if nothing does."""
    if not isinstance(told, dict) or not isinstance(told.get("modules"), list):
        return f"config.json tells of a quantisation {told!r} without the list of its 'modules'"
    scheme, version = told.get("scheme"), told.get("version")
    if version == VERSION and scheme in get_args(Scheme):
        return ""
    known = " and ".join(map(repr, get_args(Scheme)))
    return f"its quantisation is {scheme!r} of version {version!r}, and this release reads {known} of version {VERSION}"


def plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's state for a file: `weight` in int8 `[m, n]`, `weight_scale` in float32 `[m]`, all else as it is.

    A tensor with several names appears under its first.
    """
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) in seen:
            continue
        seen.add(id(value))
        if is_int8(value):
            state[name] = value.qdata.contiguous()
            state[_scale_of(name)] = value.scale.flatten().contiguous()
        else:
            state[name] = value.detach().contiguous()
    return state


def assembled(state: Mapping[str, Tensor], told: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """Inverse of `plain_tensors`: torchao's tensors under the names of the weights.

    Args:
        state: As read.
        told: See `told_of`.
        source: Where it came from, for messages.

    Raises:
        MissingPackagesError: torchao is not installed.
        CheckpointMismatchError: a number or scale is missing, or another weight is in int8.
    """
    check_torchao("a model in int8")
    found = dict(state)
    names = [f"{module}.weight" for module in told["modules"]]
    if missing := [key for name in names for key in (name, _scale_of(name)) if key not in found]:
        raise CheckpointMismatchError.keys(source, missing, [])
    others = [name for name, value in found.items() if value.dtype == torch.int8 and name not in names]
    if others:
        raise CheckpointMismatchError(source, f"{others[0]!r} is in int8, which config.json does not tell")
    for name in names:
        numbers, scale = found[name], found.pop(_scale_of(name))
        if numbers.dtype != torch.int8 or numbers.ndim != 2 or scale.shape != numbers.shape[:1]:
            shapes = f"{list(numbers.shape)} in {numbers.dtype} with scales {list(scale.shape)}"
            raise CheckpointMismatchError(source, f"{name!r} is {shapes}, not [m, n] in int8 with scales [m]")
        found[name] = _tensor(numbers, scale[:, None], told["scheme"])
    return found


def _tensor(numbers: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    zero = torch.zeros_like(scale, dtype=torch.int8)
    block = [1, numbers.shape[1]]
    tensor: Tensor = _torchao()(numbers, scale, block, torch.float32, zero_point=zero, **_activations(scheme))
    return tensor


def _scale_of(weight: str) -> str:
    return f"{weight.removesuffix('weight')}{_SCALE}"


def _granularity() -> dict[str, Any]:
    from torchao.quantization import PerRow

    return {"granularity": PerRow()}


def _activations(scheme: Scheme) -> dict[str, Any]:
    if scheme == "int8_weight_only":
        return {}
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import QuantizeTensorToInt8Kwargs

    return {"act_quant_kwargs": QuantizeTensorToInt8Kwargs(**_granularity())}


def _torchao() -> Any:
    """The class of its tensors, imported without what it says of kernels for other machines."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        from torchao.quantization import Int8Tensor
    finally:
        logging.disable(before)
    return Int8Tensor
