"""Every decoder family: its targets, importance against autograd, each way of loading, and generating."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lowrank_pl import from_pretrained
from lowrank_pl.checkpoint import load_model
from lowrank_pl.contract import TargetSpec
from lowrank_pl.core import LinearShape
from lowrank_pl.export import export
from lowrank_pl.importance import FisherKind, SecondMoments, empirical_fisher
from lowrank_pl.importance.batches import split
from lowrank_pl.nn import dense_shape
from lowrank_pl.nn.view import is_transposed
from lowrank_pl.strategies import KroneckerSVD
from lowrank_pl.surgery import TargetSelector, read_layout
from lowrank_pl.tasks import CausalLM
from tests.export.test_export import load_remotely
from tests.export.test_export import logits as logits_of_export
from tests.importance.reference import assert_same, reference_fisher
from tests.support.forks import Forks
from tests.support.runs import make_trainer
from tests.support.synthetic import SyntheticData
from tests.support.tiny import DECODERS, VOCAB, save_tiny_decoder, tiny_decoder

TARGET = TargetSpec("text", "causal_lm", (), ("perplexity",))
GATED = {"mlp.gate_proj": (64, 32), "mlp.up_proj": (64, 32), "mlp.down_proj": (32, 64)}
# Two heads of keys and values for four of queries: half as many outputs.
GROUPED = {f"self_attn.{name}_proj": (16 if name in "kv" else 32, 32) for name in "qkvo"} | GATED
LINEARS: dict[str, dict[str, tuple[int, int]]] = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "gemma"), GROUPED),
    "gpt2": {"attn.c_attn": (96, 32), "attn.c_proj": (32, 32), "mlp.c_fc": (128, 32), "mlp.c_proj": (32, 128)},
    "opt": {f"self_attn.{name}_proj": (32, 32) for name in ("k", "v", "q", "out")} | {"fc1": (64, 32), "fc2": (32, 64)},
    "gpt_neox": {
        "attention.query_key_value": (96, 32),
        "attention.dense": (32, 32),
        "mlp.dense_h_to_4h": (64, 32),
        "mlp.dense_4h_to_h": (32, 64),
    },
}


def windows(count: int = 3, length: int = 10) -> dict[str, Tensor]:
    ids = torch.randint(5, len(VOCAB), (count, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def task_of(model: Any) -> CausalLM:
    task = CausalLM("in memory")
    task.encoder, task.target = model, TARGET
    return task


@pytest.mark.parametrize("family", list(DECODERS))
def test_the_linears_of_every_block_are_targets_and_the_head_is_not(family: str) -> None:
    model = tiny_decoder(family)
    shapes = {name: dense_shape(layer) for name, layer in TargetSelector().select(model).items()}
    for name, (m, n) in LINEARS[family].items():
        own = [shape for full, shape in shapes.items() if full.endswith(f".{name}")]
        assert own == [LinearShape(m, n)] * 2
    assert len(shapes) == 2 * len(LINEARS[family])
    assert not any("head" in name or "embed" in name for name in shapes)


@pytest.mark.parametrize("family", list(DECODERS))
def test_importance_is_that_of_autograd(family: str) -> None:
    """Fisher information by the gradients of the weights; second moments by hooks, of which their product is one."""
    model, batch = tiny_decoder(family), windows()
    task, layers = task_of(model), TargetSelector().select(model)
    expected = reference_fisher(layers, list(split(batch, 1)), task.per_sample_losses)
    found = empirical_fisher(model, layers, split(batch, 2), task.per_sample_losses, FisherKind.SUMS)
    moments = SecondMoments().measure(model, layers, split(batch, 2), task.per_sample_losses)
    references = {name: _moments(task, layer, batch) for name, layer in layers.items()}
    for name, layer in layers.items():
        fisher = expected[name].T if is_transposed(type(layer)) else expected[name]
        assert_same(found.layers[name].input_sums, fisher.sum(0))
        assert_same(found.layers[name].output_sums, fisher.sum(1))
        inputs, outputs = references[name]
        assert moments.layers[name].inputs is not None
        assert moments.layers[name].outputs is not None
        assert_same(moments.layers[name].inputs, inputs)  # type: ignore[arg-type]
        assert_same(moments.layers[name].outputs, outputs)  # type: ignore[arg-type]
    # One input; to the query of the first token, which sees nothing but itself, no gradient comes back.
    shared = [n for n in layers if n.endswith(("layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj"))]
    assert len({id(moments.layers[name].inputs) for name in shared}) <= 1


def _moments(task: CausalLM, layer: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """`Σ x xᵀ / T` and `Σ g gᵀ / |D|` of one layer, window by window."""
    rows: list[tuple[Tensor, Tensor]] = []
    for sample in split(batch, 1):
        seen: list[tuple[Tensor, Tensor]] = []

        def hook(_: Any, args: Any, output: Tensor, seen: list[tuple[Tensor, Tensor]] = seen) -> None:
            seen.append((args[0].detach(), output))

        handle = layer.register_forward_hook(hook)
        loss = task.per_sample_losses(sample).sum()
        handle.remove()
        (gradient,) = torch.autograd.grad(loss, [seen[0][1]])
        x, g = seen[0][0].double().flatten(0, -2), gradient.double().flatten(0, -2)
        # The last token predicts nothing; rounding may leave something for the query of the first one.
        kept = g.abs().amax(1) > 1e-5 * g.abs().max()
        rows.append((x[kept], g[kept]))
    x, g = (torch.cat(part) for part in zip(*rows, strict=True))
    return x.mT @ x / len(x), g.mT @ g / len(batch["input_ids"])


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path, Path]]:
    """By family: the factorised model, its checkpoint and its export."""
    made = {}
    for family in DECODERS:
        where = tmp_path_factory.mktemp(family)
        pretrained = save_tiny_decoder(family, where / "pretrained")
        settings = AutoModelForCausalLM.from_pretrained(pretrained).generation_config
        settings.max_length, settings.repetition_penalty = 40, 1.5
        settings.save_pretrained(pretrained)
        task = CausalLM(str(pretrained), strategy=KroneckerSVD(keep_ratio=0.5))
        data = SyntheticData("causal_lm", size=12)
        make_trainer(where, logger=False).compress(task, data, output=str(where / "small"))
        made[family] = (task.encoder, where / "small", export(str(where / "small"), str(where / "out")))
    return made


def test_every_way_of_loading_gives_the_same_logits(
    compressed: Any, transformers_loaded: Forks, tmp_path: Path
) -> None:
    """From the checkpoint, from the export by this package and, in a process without it, by transformers alone."""
    remote = load_remotely(
        transformers_loaded, "AutoModelForCausalLM", tmp_path, *(folder for _, _, folder in compressed.values())
    )
    for (model, checkpoint, folder), theirs in zip(compressed.values(), remote, strict=True):
        expected = logits_of_export(model)
        for source in (checkpoint, folder):
            again = CausalLM(init_from=str(source))
            again.build()
            assert torch.equal(logits_of_export(again.encoder), expected)
            assert again.encoder.generation_config.repetition_penalty == 1.5
        assert torch.equal(logits_of_export(from_pretrained(str(folder))), expected)
        torch.testing.assert_close(theirs, expected, rtol=0, atol=1e-6)  # may have another number of threads


def test_tied_embeddings_stay_tied_and_no_layers_are_merged(compressed: Any) -> None:
    _, _, folder = compressed["llama"]
    model: Any = from_pretrained(str(folder))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    names = read_layout(model).modules
    assert all(name.rsplit(".", 1)[1].endswith("_proj") for name in names)
    dense = export(str(compressed["llama"][1]), str(folder.parent / "dense"), "dense")
    vanilla: Any = AutoModelForCausalLM.from_pretrained(dense)
    attention = vanilla.model.layers[0].self_attn
    assert [tuple(getattr(attention, f"{n}_proj").weight.shape) for n in "qkv"] == [(32, 32), (16, 32), (16, 32)]
    torch.testing.assert_close(logits_of_export(vanilla), logits_of_export(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("source", ["folder", "checkpoint", "dense"])
@pytest.mark.parametrize("family", list(DECODERS))
def test_generating_with_and_without_a_cache_is_the_same(
    family: str, source: str, compressed: Any, tmp_path: Path
) -> None:
    _, checkpoint, folder = compressed[family]
    model: Any
    if source == "folder":
        model = from_pretrained(str(folder))
    elif source == "checkpoint":
        model = load_model(str(checkpoint))
    else:
        model = AutoModelForCausalLM.from_pretrained(export(str(checkpoint), str(tmp_path / "dense"), "dense"))
    assert model.generation_config.max_length == 40
    prompt = windows(2, 5)["input_ids"]
    options = {"do_sample": False, "max_length": 24, "eos_token_id": None, "repetition_penalty": 1.0}
    mask = torch.ones_like(prompt)
    cached = model.generate(prompt, attention_mask=mask, use_cache=True, **options)
    assert torch.equal(cached, model.generate(prompt, attention_mask=mask, use_cache=False, **options))
    assert cached.shape == (2, 24)
    with torch.no_grad():  # each token is what the model as a whole predicts from those before it
        assert torch.equal(model(cached).logits[:, 4:-1].argmax(-1), cached[:, 5:])
