"""`lowrank_pl.save_pretrained`: factorised models of transformers, whoever has made them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    AutoModelForSeq2SeqLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MarianConfig,
    MarianMTModel,
    ViTConfig,
    ViTForImageClassification,
)

import lowrank_pl
from lowrank_pl.errors.checkpoint import CheckpointMismatchError, DamagedWeightsError
from lowrank_pl.errors.export import NonFiniteWeightsError, NotSavableError, UntoldChangeError
from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.errors.outputs import OutputExistsError
from lowrank_pl.files.checksums import CHECKSUMS
from lowrank_pl.nn import LowRankLinear, SVDLinear
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


def test_weights_that_an_architecture_could_compute_are_written_too(tmp_path: Path) -> None:
    """Marian's own method leaves its sinusoids out."""
    one: Any = {"layers": 1, "ffn_dim": 64, "attention_heads": 2}
    sizes = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in one.items()}
    config = MarianConfig(vocab_size=len(VOCAB), d_model=32, pad_token_id=0, max_position_embeddings=32, **sizes)
    model = MarianMTModel(config).eval()
    lowrank_pl.compress(model, None, None, SVD(keep_ratio=0.5))
    lowrank_pl.save_pretrained(model, str(tmp_path / "out"))
    ours = lowrank_pl.from_pretrained(str(tmp_path / "out"))
    remote = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    remote.save_pretrained(tmp_path / "again")
    again = lowrank_pl.from_pretrained(str(tmp_path / "again"))
    with torch.no_grad():
        expected, *found = (m(input_ids=IDS, decoder_input_ids=IDS).logits for m in (model, ours, remote, again))
    assert all(torch.equal(other, expected) for other in found)


def test_every_auto_class_of_the_architecture_finds_the_factors(tmp_path: Path) -> None:
    """By one that config.json did not name the model would be transformers' own, with random layers."""
    model = model_of("gpt2")
    folder = lowrank_pl.save_pretrained(model, str(tmp_path / "out"))
    for auto in (AutoModelForCausalLM, AutoModelForPreTraining):
        assert torch.equal(logits(auto.from_pretrained(folder, trust_remote_code=True)), logits(model))


def test_a_configuration_with_infinity_is_read(tmp_path: Path) -> None:
    """JSON has no such number, and transformers writes it in a way of its own."""
    config = Mamba2Config(
        vocab_size=len(VOCAB), hidden_size=32, num_hidden_layers=1, num_heads=8, head_dim=8, state_size=4, n_groups=1
    )
    model = Mamba2ForCausalLM(config).eval()
    lowrank_pl.compress(model, None, None, SVD(keep_ratio=0.5))
    loaded: Any = lowrank_pl.from_pretrained(str(lowrank_pl.save_pretrained(model, str(tmp_path / "out"))))
    assert tuple(loaded.config.time_step_limit) == tuple(model.config.time_step_limit) == (0.0, math.inf)
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


def without_pooler() -> Any:
    return BertModel(tiny_config("bert"), add_pooling_layer=False)


def with_another_head(head: Callable[[], nn.Module]) -> Any:
    model = model_of("bert")
    model.classifier = head()
    return model


def untied() -> Any:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(VOCAB), tie_word_embeddings=True, **SIZES))
    model.lm_head.weight = nn.Parameter(torch.ones(len(VOCAB), 32))
    return model


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (without_pooler, r"it lacks 'pooler.dense.weight', 'pooler.dense.bias'"),
        (
            lambda: with_another_head(lambda: nn.Linear(32, 5)),
            r"its 'classifier.weight' is \[5, 32\] and not \[2, 32\]",
        ),
        (lambda: with_another_head(lambda: nn.Sequential(nn.Linear(32, 2))), r"it lacks 'classifier.weight'"),
        (lambda: with_another_head(lambda: nn.Sequential(LowRankLinear(32, 2, 1))), "have no counterpart there"),
        (untied, r"'model.embed_tokens.weight' and 'lm_head.weight' are two tensors, and one there"),
    ],
)
def test_what_its_configuration_does_not_tell_is_refused(make: Callable[[], Any], problem: str, tmp_path: Path) -> None:
    """Loaded again it would be an error at best, and at worst a model with other weights."""
    with pytest.raises(UntoldChangeError, match=problem):
        lowrank_pl.save_pretrained(make(), str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_change_that_the_configuration_tells_is_written(tmp_path: Path) -> None:
    model = with_another_head(lambda: nn.Linear(32, 5))
    model.config.num_labels = 5
    model.resize_token_embeddings(len(VOCAB) + 3)
    lowrank_pl.save_pretrained(model, str(tmp_path / "out"))
    assert torch.equal(logits(lowrank_pl.from_pretrained(str(tmp_path / "out"))), logits(model))
    tied, apart = untied(), str(tmp_path / "untied")
    tied.config.tie_word_embeddings = False
    lowrank_pl.save_pretrained(tied, apart)
    assert torch.equal(logits(lowrank_pl.from_pretrained(apart)), logits(tied.eval()))


def test_a_file_with_two_values_for_one_tensor_is_refused(tmp_path: Path) -> None:
    """Transformers' loader takes both and ties nothing; to tie them would give one of them up."""
    model = untied()
    model.config.tie_word_embeddings = False
    lowrank_pl.save_pretrained(model, str(tmp_path / "out"))
    place = tmp_path / "out" / "config.json"
    place.write_text(place.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    with pytest.raises(CheckpointMismatchError, match="differ there and are one tensor here"):
        lowrank_pl.from_pretrained(str(tmp_path / "out"))


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
