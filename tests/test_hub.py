import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertModel,
)
from transformers.utils import logging as transformers_logging

from lowrank_pl.errors import LowRankError
from lowrank_pl.errors.checkpoint import CheckpointMismatchError, DamagedWeightsError, NotACheckpointError
from lowrank_pl.errors.pretrained import HubUnreachableError, ModelFolderError, PackageModelError, UnsupportedModelError
from lowrank_pl.files.checksums import write_checksums
from lowrank_pl.hub import load_config, load_exactly, load_pretrained, load_tokenizer, resolve_pretrained
from tests.support.tiny import FAMILIES, save_tiny_model

LOADERS: dict[str, Callable[[str], Any]] = {
    "config": load_config,
    "tokenizer": load_tokenizer,
    "model": lambda name: load_pretrained(AutoModelForSequenceClassification, name),
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("bert", tmp_path_factory.mktemp("hub") / "bert")


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "bert"))


@pytest.fixture
def tuned(pristine: Path, tmp_path: Path) -> Path:
    """The encoder with a head for three classes."""
    model, _ = load_pretrained(AutoModelForSequenceClassification, str(pristine), num_labels=3)
    model.save_pretrained(tmp_path / "tuned")
    return tmp_path / "tuned"


@pytest.fixture
def package(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An importable package that carries the model in `sub/model`, and fails when imported."""
    root = tmp_path / "site" / "carried_model"
    shutil.copytree(pristine, root / "sub" / "model")
    (root / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (tmp_path / "site" / "single_file.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return "carried_model"


def drop_weights(folder: Path, *keys: str) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for key in keys:
        del tensors[key]
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_package_address_leads_to_its_folder_without_importing_it(package: str, tmp_path: Path) -> None:
    resolved = resolve_pretrained("pkg://carried_model/sub/model")
    assert resolved == str(tmp_path / "site" / "carried_model" / "sub" / "model")
    assert "carried_model" not in sys.modules
    assert load_config("pkg://carried_model/sub/model").model_type == "bert"


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("pkg://no_such_module/model", "'no_such_module' is not installed"),
        ("pkg://no_such_module.inner/model", "'no_such_module.inner' is not installed"),
        ("pkg://carried_model/elsewhere", "'carried_model' is installed but has no folder 'elsewhere'"),
        ("pkg://carried_model/sub/model/config.json", "has no folder 'sub/model/config.json'"),
        ("pkg://single_file/model", "'single_file' is not installed"),
        ("pkg://", "'' is not installed"),
        ("pkg://.relative/model", "'.relative' is not installed"),
    ],
)
def test_bad_package_addresses_tell_what_is_wrong(package: str, address: str, problem: str) -> None:
    with pytest.raises(PackageModelError) as caught:
        resolve_pretrained(address)
    assert repr(address) in str(caught.value)
    assert problem in str(caught.value)
    assert "pkg://module/sub/folder" in str(caught.value)


def test_a_package_folder_without_a_config_is_refused(package: str) -> None:
    with pytest.raises(ModelFolderError, match=r"has no config\.json.*'model'"):
        resolve_pretrained("pkg://carried_model/sub")


@pytest.mark.parametrize("name", ["bert-base-uncased", "google/electra-small-discriminator"])
def test_a_hub_id_passes_unchanged(name: str) -> None:
    assert resolve_pretrained(name) == name


@pytest.mark.parametrize("name", ["./missing", "/missing/model", "~/missing-model", "a/b/c", "../missing"])
def test_a_missing_path_is_not_taken_for_a_hub_id(name: str) -> None:
    with pytest.raises(HubUnreachableError) as caught:
        resolve_pretrained(name)
    assert repr(name) in str(caught.value)
    assert "no such file or folder" in str(caught.value)


def test_a_local_folder_wins_over_a_hub_id_and_home_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve_pretrained("~/bert") == str(folder)
    monkeypatch.chdir(folder.parent)
    assert resolve_pretrained("bert") == "bert"
    assert load_config("bert").hidden_size == 32


def test_a_file_or_a_folder_without_config_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ModelFolderError, match="it is a file"):
        resolve_pretrained(str(folder / "config.json"))
    (tmp_path / "void").mkdir()
    with pytest.raises(ModelFolderError, match=r"has no config\.json \(found: nothing\)"):
        resolve_pretrained(str(tmp_path / "void"))
    (folder / "config.json").unlink()
    with pytest.raises(ModelFolderError) as caught:
        resolve_pretrained(str(folder))
    for part in (repr(str(folder)), "has no config.json", "'model.safetensors'", "'tokenizer.json'"):
        assert part in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoder_comes_in_train_mode_with_its_weights_and_a_new_head(family: str, tmp_path: Path) -> None:
    source = save_tiny_model(family, tmp_path / family)
    model, fresh = load_pretrained(AutoModelForSequenceClassification, str(source), num_labels=5)
    assert fresh
    assert all(module.training for module in model.modules())
    assert model.config.num_labels == 5
    saved, loaded = load_file(source / "model.safetensors"), model.state_dict()
    shared = [key for key in saved if key in loaded and key.startswith(f"{model.base_model_prefix}.")]
    assert len(shared) > 10
    assert all(torch.equal(saved[key], loaded[key]) for key in shared)


def test_the_head_that_was_saved_is_not_fresh(pristine: Path) -> None:
    _, fresh = load_pretrained(AutoModelForMaskedLM, str(pristine))
    assert not fresh
    _, fresh = load_pretrained(AutoModelForTokenClassification, str(pristine))
    assert fresh


def test_a_head_for_other_labels_is_made_anew(tuned: Path) -> None:
    saved = load_file(tuned / "model.safetensors")
    same, fresh = load_pretrained(AutoModelForSequenceClassification, str(tuned), num_labels=3)
    assert not fresh
    assert torch.equal(same.state_dict()["classifier.weight"], saved["classifier.weight"])
    other, fresh = load_pretrained(AutoModelForSequenceClassification, str(tuned), num_labels=2)
    assert fresh
    assert other.state_dict()["classifier.weight"].shape == (2, 32)
    key = "bert.encoder.layer.1.output.dense.weight"
    assert torch.equal(other.state_dict()[key], saved[key])


def test_exact_loading_gives_every_tensor_back_in_train_mode(tuned: Path) -> None:
    model = load_exactly(AutoModelForSequenceClassification, str(tuned), load_config(str(tuned)))
    saved = load_file(tuned / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(saved[key], value) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_exact_loading_refuses_a_missing_head(tuned: Path) -> None:
    drop_weights(tuned, "classifier.bias")
    with pytest.raises(CheckpointMismatchError, match=r"missing 'classifier\.bias'\."):
        load_exactly(AutoModelForSequenceClassification, str(tuned), load_config(str(tuned)))


def test_exact_loading_refuses_unexpected_weights(tuned: Path) -> None:
    path = tuned / "model.safetensors"
    save_file({**load_file(path), "stray.weight": torch.ones(1)}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointMismatchError, match=r"unexpected 'stray\.weight'\."):
        load_exactly(AutoModelForSequenceClassification, str(tuned), load_config(str(tuned)))


def test_exact_loading_refuses_another_shape_with_both(tuned: Path) -> None:
    with pytest.raises(CheckpointMismatchError, match=r"'classifier\.bias' is \[3\] there and \[2\] here"):
        load_exactly(AutoModelForSequenceClassification, str(tuned), load_config(str(tuned), num_labels=2))


def test_exact_loading_names_unreadable_weights(tuned: Path) -> None:
    (tuned / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelFolderError, match="readable weights"):
        load_exactly(AutoModelForSequenceClassification, str(tuned), load_config(str(tuned)))


def test_half_precision_weights_are_widened_to_the_default_dtype(folder: Path) -> None:
    tensors = {key: value.half() for key, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    model, _ = load_pretrained(AutoModelForSequenceClassification, str(folder))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_missing_encoder_weights_are_refused_and_the_log_level_restored(folder: Path) -> None:
    key = "bert.encoder.layer.1.output.dense.weight"
    drop_weights(folder, key)
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_info()
    try:
        with pytest.raises(CheckpointMismatchError) as caught:
            load_pretrained(AutoModelForSequenceClassification, str(folder))
        assert transformers_logging.get_verbosity() == logging.INFO
    finally:
        transformers_logging.set_verbosity(before)
    assert f"missing '{key}'" in str(caught.value)
    assert repr(str(folder)) in str(caught.value)


def test_a_bare_encoder_notices_missing_weights_too(folder: Path) -> None:
    """Its keys have no prefix by which encoder and head could be told apart."""
    model, fresh = load_pretrained(AutoModel, str(folder))
    assert fresh  # a language model has no pooler
    assert isinstance(model, BertModel)
    drop_weights(folder, "bert.encoder.layer.1.output.dense.weight")
    with pytest.raises(CheckpointMismatchError, match=r"missing 'encoder\.layer\.1\.output\.dense\.weight'"):
        load_pretrained(AutoModel, str(folder))


def test_a_bare_encoder_of_another_size_is_refused_by_name(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(CheckpointMismatchError, match="intermediate"):
        load_pretrained(AutoModel, str(folder))


def test_weights_that_do_not_match_their_checksums_are_refused(folder: Path) -> None:
    write_checksums(folder)
    load_pretrained(AutoModelForSequenceClassification, str(folder))
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # a weight that is a little other
    file.write_bytes(content)
    with pytest.raises(DamagedWeightsError, match=r"model\.safetensors.* is damaged or was replaced"):
        load_pretrained(AutoModelForSequenceClassification, str(folder))
    (folder / "SHA256SUMS").unlink()
    load_pretrained(AutoModelForSequenceClassification, str(folder))


def test_a_folder_with_checksums_and_an_impossible_index_is_named_as_given(folder: Path) -> None:
    write_checksums(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(NotACheckpointError, match=r"pretrained=.*Allowed is a hub id, a Hugging Face folder or pkg://"):
        load_pretrained(AutoModelForSequenceClassification, str(folder))


def test_many_missing_encoder_weights_are_counted(folder: Path) -> None:
    drop_weights(folder, *(key for key in load_file(folder / "model.safetensors") if ".layer.1." in key))
    with pytest.raises(CheckpointMismatchError, match=r"… \(16 in all\)"):
        load_pretrained(AutoModelForSequenceClassification, str(folder))


def test_encoder_weights_of_another_size_are_refused_by_name(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(CheckpointMismatchError, match="intermediate"):
        load_pretrained(AutoModelForSequenceClassification, str(folder))


@pytest.mark.parametrize("loader", LOADERS)
def test_a_broken_config_is_the_folders_fault(folder: Path, loader: str) -> None:
    (folder / "config.json").write_text("{not json")
    with pytest.raises(LowRankError) as caught:
        LOADERS[loader](str(folder))
    assert repr(str(folder)) in str(caught.value)
    assert "is not a folder here" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"])
def test_broken_weights_name_the_folder(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(LowRankError, match="bert"):
        load_pretrained(AutoModelForSequenceClassification, str(folder))


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelFolderError, match=r"has no weights .*'config\.json'"):
        load_pretrained(AutoModelForSequenceClassification, str(folder))
    assert load_config(str(folder), num_labels=7).num_labels == 7


def test_a_folder_without_a_tokenizer_is_refused(folder: Path) -> None:
    assert load_tokenizer(str(folder)).pad_token == "[PAD]"
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelFolderError, match=r"has no tokenizer .*'model\.safetensors'"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("loader", LOADERS)
def test_a_hub_id_without_network_tells_what_to_do(loader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect to the hub\nand a second line")

    monkeypatch.setattr(AutoConfig, "from_pretrained", offline)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", offline)
    with pytest.raises(HubUnreachableError) as caught:
        LOADERS[loader]("some/model")
    for part in ("'some/model'", "We couldn't connect to the hub)", "lowrank-pl[offline]", "pkg://"):
        assert part in str(caught.value)
    assert "second line" not in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)


def test_a_model_for_pictures_is_refused(tmp_path: Path) -> None:
    """With and without a tokenizer beside it, and one for text that has no such head."""
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UnsupportedModelError, match="'vit', which does not read text"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UnsupportedModelError, match=r"'vit', which does not read text.*such as BERT"):
        load_pretrained(AutoModelForSequenceClassification, str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UnsupportedModelError, match="'gpt2', which has no AutoModelForMaskedLM"):
        load_pretrained(AutoModelForMaskedLM, str(tmp_path))
