"""Low-rank adapters (PEFT) on factorised models: on the two factors of a layer, which are linears like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_pl import from_pretrained, save_pretrained
from lowrank_pl.checkpoint import load_model
from lowrank_pl.export import export
from lowrank_pl.strategies import SVD
from lowrank_pl.surgery import TargetSelector, read_layout
from lowrank_pl.tasks import CausalLM
from tests.support.runs import make_trainer
from tests.support.synthetic import SyntheticData
from tests.support.tiny import save_tiny_decoder

peft: Any = pytest.importorskip("peft")
TOKENS = torch.arange(5, 25)[None]
# By form: the linears of a layer, as the documentation names them.
PARTS = {"low_rank": ["left", "right"], "pivoted": ["pivots", "others"]}


@pytest.fixture(scope="module", params=list(PARTS))
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A factorised decoder, vocabulary included, as checkpoint and as export; and the form of its linear layers."""
    where, form = tmp_path_factory.mktemp("peft"), request.param
    pretrained = save_tiny_decoder("llama", where / "pretrained")
    strategy = SVD(keep_ratio=0.5, form=form, targets=TargetSelector(embeddings=True))
    task = CausalLM(str(pretrained), strategy=strategy)
    make_trainer(where, logger=False).compress(task, SyntheticData("causal_lm", size=4), output=str(where / "small"))
    return where / "small", export(str(where / "small"), str(where / "folder")), form


def adapted(model: nn.Module, form: str) -> Any:
    """The model with adapters of rank 2 on the parts of all layers of its blocks."""
    inside = rf".*\.layers\..*\.({'|'.join(PARTS[form])})"
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=inside, task_type="CAUSAL_LM"))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(TOKENS).logits
    return found


def test_adapters_train_on_a_frozen_model_and_merge_into_its_factors(
    small: tuple[Path, Path, str], tmp_path: Path
) -> None:
    """From the checkpoint, by a task of this package, with its data and its optimizer."""
    checkpoint, folder, form = small
    task = CausalLM(init_from=str(checkpoint), optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2))
    task.build()
    layout, before = read_layout(task.encoder), logits(task.encoder)
    task.encoder = model = adapted(task.encoder, form)
    assert torch.allclose(logits(model), before, atol=1e-5)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.train()
    trainer = make_trainer(tmp_path, logger=False, enable_checkpointing=False)
    trainer.fit(task, SyntheticData("causal_lm", size=16))
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, start[name])}
    adapters = {name for name in start if ".lora_" in name}
    assert moved == adapters
    assert len(adapters) == 2 * 2 * len([name for name in layout.modules if ".layers." in name])

    tuned = logits(model)
    assert not torch.allclose(tuned, before, atol=1e-3)
    model.save_pretrained(tmp_path / "adapters")
    again = peft.PeftModel.from_pretrained(from_pretrained(str(folder)), tmp_path / "adapters")
    assert torch.allclose(logits(again), tuned, atol=1e-5)
    merged = model.merge_and_unload()
    assert read_layout(merged) == layout
    assert torch.allclose(logits(merged), tuned, atol=1e-5)
    written = save_pretrained(merged, str(tmp_path / "tuned"))
    assert torch.equal(logits(from_pretrained(str(written))), logits(merged))
    assert torch.equal(logits(load_model(str(written))), logits(merged))


def test_an_exported_folder_merges_into_one_of_its_own(small: tuple[Path, Path, str], tmp_path: Path) -> None:
    """Also by the model's own `save_pretrained`, since its class is of this package."""
    model = adapted(from_pretrained(str(small[1])), small[2])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    tuned = logits(model)
    merged = model.merge_and_unload()
    assert merged.config.tie_word_embeddings  # which PEFT unsets where it finds the head untied
    merged.save_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(from_pretrained(str(tmp_path / "merged"))), tuned, atol=1e-5)
