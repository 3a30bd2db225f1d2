"""GPT-2, whose linears are transformers' `Conv1D` and store their weights the other way round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, GPT2ForSequenceClassification
from transformers.pytorch_utils import Conv1D

from lowrank_pl import from_pretrained
from lowrank_pl.core import LinearShape, truncated_svd
from lowrank_pl.errors.targets import NoTargetError
from lowrank_pl.export import export
from lowrank_pl.importance import FisherKind, empirical_fisher
from lowrank_pl.nn import LowRankLinear, dense_weight, forms_in
from lowrank_pl.strategies import FWSVD, SVD, RankDyna
from lowrank_pl.surgery import TargetSelector, compact_, conform_, densify_, read_layout, svd_layers
from tests.export.test_export import load_remotely
from tests.export.test_export import logits as logits_of_export
from tests.importance.reference import assert_same, classification_loss, reference_fisher, single_samples
from tests.support.forks import Forks
from tests.support.runs import last_checkpoint, make_task, make_trainer
from tests.support.synthetic import SyntheticData
from tests.support.tiny import VOCAB, tiny_tokenizer
from tests.surgery.encoders import in_groups_, logits, padded_batch
from tests.surgery.test_layout import factorise_

SHAPES = {
    "attn.c_attn": LinearShape(96, 32),
    "attn.c_proj": LinearShape(32, 32),
    "mlp.c_fc": LinearShape(128, 32),
    "mlp.c_proj": LinearShape(32, 128),
}


def tiny_gpt2(num_labels: int = 3) -> Any:
    config: Any = AutoConfig.for_model(
        "gpt2",
        vocab_size=len(VOCAB),
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        pad_token_id=0,
        num_labels=num_labels,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2ForSequenceClassification(config)
        for parameter in model.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("gpt2") / "model"
    tiny_gpt2(2).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_they_are_targets_with_outputs_and_inputs_the_right_way_round() -> None:
    targets = TargetSelector().select(tiny_gpt2())
    expected = {f"transformer.h.{i}.{name}": shape for i in range(2) for name, shape in SHAPES.items()}
    assert TargetSelector.shapes(targets) == expected
    assert all(type(layer) is Conv1D for layer in targets.values())


def test_full_rank_is_the_same_function() -> None:
    model, batch = tiny_gpt2(), padded_batch()
    before = logits(model, batch)
    for layer, rank in zip(forms_in(factorise_(model, 32)).values(), [32] * 8, strict=True):
        assert layer.rank == rank
    torch.testing.assert_close(logits(model, batch), before, rtol=0, atol=1e-4)
    with pytest.raises(NoTargetError, match="8 layers are factorised already"):
        TargetSelector().select(model)


@pytest.mark.parametrize("trained", [False, True])
def test_multiplied_back_they_are_conv1d_again_and_load_in_the_vanilla_class(trained: bool) -> None:
    model, batch = tiny_gpt2(), padded_batch()
    changed: Any = in_groups_(model) if trained else factorise_(model, 5)
    before = logits(changed, batch)
    compacted = compact_(changed)
    torch.testing.assert_close(logits(compacted, batch), before, rtol=0, atol=1e-5)
    densify_(compacted)
    assert sum(type(module) is Conv1D for module in model.modules()) == 8
    fresh = GPT2ForSequenceClassification(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(fresh, batch), before, rtol=0, atol=1e-5)


def test_a_layout_conforms_a_fresh_model_and_back() -> None:
    source, fresh, batch = factorise_(tiny_gpt2(), 5), tiny_gpt2(), padded_batch()
    conform_(fresh, read_layout(source))
    fresh.load_state_dict(source.state_dict())
    assert torch.equal(logits(fresh, batch), logits(source, batch))
    conform_(fresh, read_layout(tiny_gpt2()))
    assert sum(type(module) is Conv1D for module in fresh.modules()) == 8


@pytest.mark.parametrize("kind", list(FisherKind))
def test_fisher_is_that_of_autograd(kind: FisherKind) -> None:
    model, batch = tiny_gpt2(), {**padded_batch((9, 4, 7)), "labels": torch.arange(3)}
    layers = TargetSelector().select(model)
    expected = reference_fisher(layers, single_samples(batch), classification_loss(model))
    found = empirical_fisher(model, layers, [batch], classification_loss(model), kind)
    for name, reference in expected.items():
        assert_same(found.layers[name].input_sums, reference.T.sum(0))
        assert_same(found.layers[name].output_sums, reference.T.sum(1))


@pytest.mark.parametrize("method", [SVD, FWSVD])
def test_compressed_exported_and_loaded_it_gives_the_same_logits(
    transformers_loaded: Forks, method: Any, pretrained: str, tmp_path: Path
) -> None:
    task = make_task(pretrained, method(keep_ratio=0.5))
    make_trainer(tmp_path, logger=False).compress(task, SyntheticData(size=16), output=str(tmp_path / "small"))
    expected = logits_of_export(task.encoder)
    if method is SVD:
        name = "transformer.h.0.mlp.c_proj"
        dense = make_task(pretrained)
        dense.build(SyntheticData().target)
        layer, weight = task.encoder.get_submodule(name), dense_weight(dense.encoder.get_submodule(name)).detach()
        assert type(layer) is LowRankLinear
        torch.testing.assert_close(layer.product().detach(), truncated_svd(weight, layer.rank).product())
    where = export(str(tmp_path / "small"), str(tmp_path / "out"))
    assert torch.equal(logits_of_export(from_pretrained(str(where))), expected)
    again = make_task(None, init_from=str(where))
    again.build()
    assert torch.equal(logits_of_export(again.encoder), expected)
    if method is SVD:
        (remote,) = load_remotely(transformers_loaded, "AutoModelForSequenceClassification", tmp_path, where)
        assert torch.equal(remote, expected)
    dense_folder = export(str(tmp_path / "small"), str(tmp_path / "dense"), "dense")
    vanilla_class: Any = GPT2ForSequenceClassification
    vanilla, info = vanilla_class.from_pretrained(dense_folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(logits_of_export(vanilla), expected, rtol=0, atol=1e-5)


def test_ranks_shrink_in_training(pretrained: str, tmp_path: Path) -> None:
    task, trainer = make_task(pretrained, RankDyna(keep_ratio=0.4)), make_trainer(tmp_path, max_epochs=2)
    trainer.fit(task, datamodule=SyntheticData())
    assert not svd_layers(task.encoder)
    assert task.compression.keep_ratio <= 0.4
    loaded = make_task(None, init_from=last_checkpoint(trainer))
    loaded.build()
    torch.testing.assert_close(logits_of_export(loaded.encoder), logits_of_export(task.encoder), rtol=0, atol=1e-6)
