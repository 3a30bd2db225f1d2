"""Loading an exported folder without running any code from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel

from lowrank_pl.errors.model import CheckpointMismatchError, NotACheckpointError
from lowrank_pl.export.as_saved import take_dtypes_, take_generation_config_
from lowrank_pl.export.module_file import MODULE, class_name, module_text
from lowrank_pl.files.checksums import write_checksums
from lowrank_pl.files.weight_files import remove_superseded
from lowrank_pl.hub import uninitialised
from lowrank_pl.surgery import read_layout
from lowrank_pl.tasks.saved import LAYOUT_KEY, read_saved_model

BASE_KEY = "lowrank_base"


class _Factorised:
    """What a factorised model can do beyond its parent: write itself so that it loads again."""

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any) -> None:
        """As transformers', with the layout in config.json, the module file beside it, and checksums of the weights."""
        base = next(c for c in type(self).__mro__ if c.__module__.startswith("transformers.models."))
        self.config.update(config_fields(self, base.__name__))  # type: ignore[attr-defined]
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
        base = next(c for c in type(self).__mro__ if c.__module__.startswith("transformers.models."))
        (folder / f"{MODULE}.py").write_text(module_text(base.__name__), encoding="utf-8")
        remove_superseded(folder)
        write_checksums(folder)


def config_fields(model: Any, base: str) -> dict[str, Any]:
    """What config.json needs beyond the architecture's own fields."""
    auto = [name for name in AUTO_CLASSES if getattr(transformers, base) in _classes_of(name, type(model.config))]
    return {
        BASE_KEY: base,
        LAYOUT_KEY: read_layout(model).to_dict(),
        "auto_map": {name: f"{MODULE}.{class_name(base)}" for name in auto},
    }


AUTO_CLASSES = (
    *("AutoModelForSequenceClassification", "AutoModelForTokenClassification", "AutoModelForMaskedLM"),
    *("AutoModelForQuestionAnswering", "AutoModelForMultipleChoice", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"),
    *("AutoModelForImageClassification", "AutoModelForAudioClassification", "AutoModel"),
)


def _classes_of(auto_class: str, config_class: type) -> tuple[type, ...]:
    """What an Auto class makes of a configuration; its whole table would import every model there is, for seconds."""
    table = getattr(transformers, auto_class)._model_mapping
    found = table.get(config_class, ())
    return found if isinstance(found, tuple) else (found,)


def factorised_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A subclass of an architecture whose `save_pretrained` keeps the factors."""
    made: type[PreTrainedModel] = type(class_name(base.__name__), (_Factorised, base), {"__module__": __name__})
    return made


def from_pretrained(folder: str) -> PreTrainedModel:
    """Loads a model that `export` or `save_pretrained` has written, in eval mode; no code of the folder is run.

    Args:
        folder: With config.json and safetensors.

    Returns:
        The model with its factorised layers; its `save_pretrained` writes the same folder again.

    Raises:
        NotACheckpointError: there is no readable model, or not one of this package.
        DamagedWeightsError: the weights are not those that `SHA256SUMS` in the folder tells of.
        LayoutVersionError: an incompatible release has written it.
        CheckpointMismatchError: config.json and the weights disagree.
    """
    saved = read_saved_model(folder, "from_pretrained")
    name = getattr(saved.config, BASE_KEY, None)
    if saved.dense_folder is not None or name is None:
        problem = f"config.json names no {BASE_KEY!r}: a dense model loads by transformers"
        raise NotACheckpointError(folder, problem, "from_pretrained")
    base = getattr(transformers, str(name), None)
    if not (isinstance(base, type) and issubclass(base, PreTrainedModel)):
        raise CheckpointMismatchError(folder, f"transformers {transformers.__version__} has no class {name!r}")
    with uninitialised():
        model = factorised_class(base)(saved.config)
    model.tie_weights()
    take_dtypes_(model, saved)
    saved.load_into_(model)
    take_generation_config_(model, folder)
    model.config.update(config_fields(model, str(name)))
    loaded: PreTrainedModel = model.eval()
    return loaded
