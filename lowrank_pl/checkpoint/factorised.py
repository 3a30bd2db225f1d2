"""Factorised models as classes of transformers, which write what `from_pretrained` and transformers load."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import save_file
from transformers import PreTrainedModel

from lowrank_pl.checkpoint.building import auto_classes_making, outline
from lowrank_pl.checkpoint.entries import BASE_KEY, INT8_KEY, LAYOUT_KEY
from lowrank_pl.checkpoint.int8 import is_quantized, plain_tensors, told_of
from lowrank_pl.checkpoint.module_file import MODULE, class_name, module_text
from lowrank_pl.checkpoint.saved import same_values, tied_names
from lowrank_pl.errors.checkpoint import CheckpointMismatchError
from lowrank_pl.errors.export import NotSavableError, UntoldChangeError
from lowrank_pl.errors.wording import listed
from lowrank_pl.files.checksums import write_checksums
from lowrank_pl.files.weight_files import INT8, remove_superseded
from lowrank_pl.surgery import conform_, read_layout


class _Factorised:
    """What a factorised model can do beyond its parent: write itself so that it loads again."""

    made_by: ClassVar[str | None] = None
    """Name of the Auto class by which its folder loads where this package is not installed."""

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any) -> None:
        """As transformers', with the layout in config.json, the module file beside it, and checksums of the weights.

        A model in eight bits is written as one file that `from_pretrained` of this package alone reads.

        Raises:
            UntoldChangeError: its configuration makes another model, into which the weights would not load.
        """
        _check_configuration(self)
        if is_quantized(self):  # type: ignore[arg-type]
            if kwargs.get("push_to_hub"):
                raise NotSavableError(type(self).__name__, "in int8 it is not uploaded on the way; upload the folder")
            if is_main_process:
                _write_int8(self, Path(save_directory))
            return
        self.config.update(config_fields(self))  # type: ignore[attr-defined]
        # What an architecture could compute anew is written as well: a missing weight is an error for whoever loads.
        self._keys_to_ignore_on_save = None
        # Names of today, those of the layout: transformers would write some families' weights under names of the past.
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)  # type: ignore[misc]
        if is_main_process:
            self._complete(Path(save_directory))

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        """Completes a folder before transformers uploads it, which `save_pretrained(push_to_hub=True)` does itself."""
        self._complete(Path(working_dir))
        return super()._upload_modified_files(working_dir, *args, **kwargs)  # type: ignore[misc]

    def _complete(self, folder: Path) -> None:
        """Adds what transformers does not write."""
        (folder / f"{MODULE}.py").write_text(module_text(_base_of(self)), encoding="utf-8")
        remove_superseded(folder)
        write_checksums(folder)


def _check_configuration(model: Any) -> None:
    """Raises `UntoldChangeError` for a model that was changed in a way its configuration does not tell."""
    base = _architecture_of(model)
    rebuilt = outline(base, copy.deepcopy(model.config))
    try:
        conform_(rebuilt, read_layout(model))
    except CheckpointMismatchError as error:
        raise UntoldChangeError(base.__name__, "some of its factorised layers have no counterpart there") from error
    made, own = rebuilt.state_dict(), model.state_dict(keep_vars=True)
    if lacking := [name for name in made if name not in own]:
        raise UntoldChangeError(base.__name__, f"it lacks {listed(lacking, 3)}")
    if more := [name for name in own if name not in made]:
        raise UntoldChangeError(base.__name__, f"it has {listed(more, 3)} beside what is there")
    for name, tensor in made.items():
        if tensor.shape != own[name].shape:
            problem = f"its {name!r} is {list(own[name].shape)} and not {list(tensor.shape)}"
            raise UntoldChangeError(base.__name__, problem)
    for first, *others in tied_names(rebuilt):
        if parted := [name for name in others if not same_values(own[first], own[name])]:
            raise UntoldChangeError(base.__name__, f"{first!r} and {parted[0]!r} are two tensors, and one there")


def _write_int8(model: Any, folder: Path) -> None:
    """Writes config.json, the numbers and scales, and their checksums."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.update(config_fields(model))
    model.config.architectures = [type(model).__name__]  # as save_pretrained does
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    save_file(plain_tensors(model), folder / INT8, metadata={"format": "pt"})
    write_checksums(folder)


def config_fields(model: Any) -> dict[str, Any]:
    """What the config.json of a factorised model needs beyond the architecture's own fields."""
    base = _base_of(model)
    fields: dict[str, Any] = {BASE_KEY: base, LAYOUT_KEY: read_layout(model).to_dict()}
    if is_quantized(model):  # no module file: transformers finds no weights, and takes no random ones
        return {**fields, INT8_KEY: told_of(model)}
    if model.made_by is None:
        return fields
    # By every class that would make the architecture: by another than those it would be dense, with random layers.
    names = dict.fromkeys([model.made_by, *auto_classes_making(_architecture_of(model), type(model.config))])
    return {**fields, "auto_map": dict.fromkeys(names, f"{MODULE}.{class_name(base)}")}


def _architecture_of(model: Any) -> type[PreTrainedModel]:
    found: type[PreTrainedModel] = next(
        kind for kind in type(model).__mro__ if kind.__module__.startswith("transformers.models.")
    )
    return found


def _base_of(model: Any) -> str:
    return _architecture_of(model).__name__


def factorised_class(base: type[PreTrainedModel], made_by: str | None) -> type[PreTrainedModel]:
    """A subclass of an architecture whose `save_pretrained` keeps the factors.

    Args:
        base: The architecture's class.
        made_by: Name of the Auto class that makes it, for config.json.
    """
    fields = {"__module__": __name__, "made_by": made_by}
    made: type[PreTrainedModel] = type(class_name(base.__name__), (_Factorised, base), fields)
    return made
