"""`lowrank_pl.save_pretrained`: factorised models of transformers, whoever has made them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import lowrank_pl
from lowrank_pl.errors.checkpoint import CheckpointMismatchError, DamagedWeightsError
from lowrank_pl.errors.export import NonFiniteWeightsError, NotSavableError
from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.errors.outputs import OutputExistsError
from lowrank_pl.files.checksums import CHECKSUMS
from lowrank_pl.nn import SVDLinear
from lowrank_pl.strategies import SVD
from lowrank_pl.surgery import TargetSelector, densify_, read_layout, replace_module_
from lowrank_pl.tasks import SequenceClassification
from tests.support.tiny import VOCAB, tiny_config, tiny_tokenizer

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
IDS = torch.randint(5, len(VOCAB), (3, 7), generator=torch.Generator().manual_seed(0))
IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
MODELS: dict[str, Any] = {
    "vit": lambda: ViTForImageClassification(
        ViTConfig(**{"image_size": 16, "patch_size": 4, "num_labels": 3, **SIZES})
    ),
    "bert": lambda: BertForSequenceClassification(tiny_config("bert")),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=len(VOCAB), n_embd=32, n_layer=2, n_head=2, n_positions=32)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=len(VOCAB), **SIZES)),
}


def model_of(family: str) -> Any:
    """Factorised by a strategy, without task and checkpoint."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[family]().eval()
    lowrank_pl.compress(model, None, None, SVD(keep_ratio=0.5))
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        given = IMAGES.to(model.dtype) if model.main_input_name == "pixel_values" else IDS
        found: Tensor = model(given).logits
    return found


@pytest.mark.parametrize("family", MODELS)
def test_every_way_of_loading_gives_the_same_logits(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    fields, kind = model.config.to_dict(), type(model)
    folder = lowrank_pl.save_pretrained(model, str(tmp_path / "out"))
    assert model.config.to_dict() == fields
    assert type(model) is kind
    loaded = lowrank_pl.from_pretrained(str(folder))
    assert not loaded.training
    assert read_layout(loaded) == read_layout(model)
    assert torch.equal(logits(loaded), logits(model))
    lowrank_pl.save_pretrained(loaded, str(tmp_path / "again"))
    assert torch.equal(logits(lowrank_pl.from_pretrained(str(tmp_path / "again"))), logits(model))
    loaded.save_pretrained(tmp_path / "own")
    assert torch.equal(logits(lowrank_pl.from_pretrained(str(tmp_path / "own"))), logits(model))


def test_transformers_loads_the_folder_by_its_module_file(tmp_path: Path) -> None:
    model = model_of("vit")
    folder = lowrank_pl.save_pretrained(model, str(tmp_path / "out"))
    assert {path.name for path in folder.iterdir()} == {
        *("README.md", "config.json", "model.safetensors", "modeling_lowrank.py", CHECKSUMS)
    }
    assert "AutoModelForImageClassification" in (folder / "README.md").read_text(encoding="utf-8")
    loaded = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    assert not any(parameter.data_ptr() % 64 for parameter in loaded.parameters())  # else kernels may add up otherwise
    assert torch.equal(logits(loaded.eval()), logits(model))
    with pytest.raises(NotSavableError, match="its class is none of transformers' own"):
        lowrank_pl.save_pretrained(loaded, str(tmp_path / "again"))  # its layers are those of the module file


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_keep_their_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    model = model_of("vit").to(dtype)
    loaded = lowrank_pl.from_pretrained(str(lowrank_pl.save_pretrained(model, str(tmp_path / "out"))))
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded), logits(model))


def test_a_decoder_generates_as_before(tmp_path: Path) -> None:
    model = model_of("gpt2")
    model.generation_config.max_new_tokens = 5
    loaded: Any = lowrank_pl.from_pretrained(str(lowrank_pl.save_pretrained(model, str(tmp_path / "out"))))
    assert loaded.generation_config.max_new_tokens == 5


def test_a_task_starts_from_the_folder(tmp_path: Path) -> None:
    model = model_of("bert")
    lowrank_pl.save_pretrained(model, str(tmp_path / "out"), tiny_tokenizer(), max_shard_size="20KB")
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    task = SequenceClassification(init_from=str(tmp_path / "out"))
    task.build()
    assert torch.equal(logits(task.encoder.eval()), logits(model))


def test_a_dense_model_is_written_too(tmp_path: Path) -> None:
    model = densify_(model_of("bert"))
    lowrank_pl.save_pretrained(model, str(tmp_path / "out"))
    assert torch.equal(logits(lowrank_pl.from_pretrained(str(tmp_path / "out"))), logits(model))


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    model, folder = model_of("bert"), str(tmp_path / "out")
    lowrank_pl.save_pretrained(model, folder)
    with pytest.raises(OutputExistsError):
        lowrank_pl.save_pretrained(model, folder)
    lowrank_pl.save_pretrained(model, folder, overwrite=True)
    weights = tmp_path / "out" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(DamagedWeightsError):
        lowrank_pl.from_pretrained(folder)


def test_what_would_not_load_again_is_refused(tmp_path: Path) -> None:
    folder = str(tmp_path / "out")

    class Mine(BertForSequenceClassification):
        """May compute anything."""

    with pytest.raises(NotSavableError, match=r"Mine cannot be written.*none of transformers' own"):
        lowrank_pl.save_pretrained(Mine(tiny_config("bert")), folder)
    with pytest.raises(NotSavableError, match="Linear cannot be written"):
        lowrank_pl.save_pretrained(nn.Linear(2, 2), folder)
    model = BertForSequenceClassification(tiny_config("bert"))
    name, layer = next(iter(TargetSelector().select(model).items()))
    replace_module_(model, name, SVDLinear.from_linear(layer, 4))
    with pytest.raises(NotSavableError, match=rf"its layer '{name}' is still in the form 'singular_groups'"):
        lowrank_pl.save_pretrained(model, folder)
    good = model_of("bert")
    with pytest.raises(RangeError, match="max_shard_size"):
        lowrank_pl.save_pretrained(good, folder, max_shard_size="many")
    words = tiny_tokenizer()
    words.add_tokens(["unheard"])
    with pytest.raises(CheckpointMismatchError, match="give its own"):
        lowrank_pl.save_pretrained(good, folder, words)
    good.classifier.bias.data[0] = torch.nan
    with pytest.raises(NonFiniteWeightsError, match=r"classifier\.bias"):
        lowrank_pl.save_pretrained(good, folder)
    assert not (tmp_path / "out").exists()
