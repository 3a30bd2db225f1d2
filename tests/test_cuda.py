"""What only a CUDA device shows; `benchmarks/gpu.sh` runs these tests, everywhere else they are skipped."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from lowrank_pl.benchmark.engines import check_engines, prepare
from lowrank_pl.benchmark.models import inputs_for, peak_memory, weight_bytes
from lowrank_pl.checkpoint.loading import load_model
from lowrank_pl.data import CausalText
from lowrank_pl.hub import load_pretrained
from lowrank_pl.importance import SecondMoments
from lowrank_pl.nn import LowRankLinear
from lowrank_pl.strategies import (
    FWSVD,
    SVD,
    TFWSVD,
    CompressionStrategy,
    KroneckerSVD,
    NoCompression,
    RankDyna,
    StaticStrategy,
)
from lowrank_pl.surgery import TargetSelector, read_layout
from lowrank_pl.tasks import CausalLM, SequenceClassification
from lowrank_pl.tasks.random_state import capture, restore
from lowrank_pl.tasks.sharding import is_sharded
from tests.export.test_export import checkpoint
from tests.importance.reference import assert_same, classification_loss
from tests.importance.test_second_moments import batches, encoder
from tests.support.runs import last_checkpoint, make_task, make_trainer
from tests.support.sharded_run import divided, optimizer
from tests.support.synthetic import SyntheticData
from tests.support.tiny import save_tiny_decoder

pytestmark = pytest.mark.cuda

Make = Callable[[], CompressionStrategy]
DEVICE = "cuda"
STATIC: dict[str, Callable[[], StaticStrategy]] = {
    "svd": lambda: SVD(keep_ratio=0.4),
    "fwsvd": lambda: FWSVD("both", keep_ratio=0.4),
    "tfwsvd": lambda: TFWSVD(keep_ratio=0.4),
    "kronecker": lambda: KroneckerSVD(keep_ratio=0.4),
}
STRATEGIES: dict[str, Make] = {"none": NoCompression, **STATIC, "rankdyna": lambda: RankDyna(keep_ratio=0.4)}


def fit(task: Any, folder: Path, **arguments: Any) -> Any:
    trainer = make_trainer(folder, **{"accelerator": DEVICE, "max_epochs": 2, **arguments})
    trainer.fit(task, datamodule=SyntheticData())
    return trainer


def check(task: Any) -> None:
    """The method has done its work, and nothing went wrong in the numbers."""
    assert all(bool(torch.isfinite(p).all()) for p in task.parameters())
    if not isinstance(task.strategy, NoCompression):
        layers = [m for m in task.encoder.modules() if isinstance(m, LowRankLinear)]
        assert layers
        assert all(bool(m.product().any()) for m in layers)
        assert task.compression.keep_ratio <= 0.4


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("make", STRATEGIES.values(), ids=STRATEGIES)
def test_training_in_every_precision(tiny_bert: str, tmp_path: Path, make: Make, precision: Any) -> None:
    task = make_task(tiny_bert, make(), optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3))
    trainer = fit(task, tmp_path, precision=precision)
    check(task)
    loaded = SequenceClassification.load_from_checkpoint(last_checkpoint(trainer), map_location="cpu")
    assert read_layout(loaded.encoder) == read_layout(task.encoder)


@pytest.mark.parametrize("make", STATIC.values(), ids=STATIC)
def test_compressing_gives_the_factors_of_the_cpu(
    tiny_bert: str, tmp_path: Path, make: Callable[[], StaticStrategy]
) -> None:
    products = []
    # A head of its own: a fresh one is drawn on the device, and every device has its own random numbers.
    model, _ = load_pretrained(AutoModelForSequenceClassification, tiny_bert, num_labels=2)
    model.save_pretrained(tmp_path / "dense")
    for place, device in (("one", "cpu"), ("other", DEVICE)):
        task = make_task(str(tmp_path / "dense"), make())
        trainer = make_trainer(tmp_path, accelerator=device, logger=False)
        trainer.compress(task, SyntheticData(), output=str(tmp_path / place))
        layers = {n: m for n, m in task.encoder.named_modules() if isinstance(m, LowRankLinear)}
        products.append({name: layer.product().detach().cpu() for name, layer in layers.items()})
        report = json.loads((tmp_path / place / "report.json").read_text(encoding="utf-8"))
        assert report["keep_ratio"] <= 0.4
    assert products[0].keys() == products[1].keys()
    for name, expected in products[0].items():
        assert float((products[1][name] - expected).norm() / expected.norm()) < 1e-2, name


@pytest.mark.parametrize("family", ["bert", "albert", "deberta-v2"])
def test_second_moments_are_those_of_the_cpu(family: str) -> None:
    model, data = encoder(family), batches()
    expected = SecondMoments().measure(model, TargetSelector().select(model), data, classification_loss(model))
    other = copy.deepcopy(model).to(DEVICE)
    moved = [{key: value.to(DEVICE) for key, value in batch.items()} for batch in data]
    found = SecondMoments().measure(other, TargetSelector().select(other), moved, classification_loss(other))
    for name, layer in expected.layers.items():
        for key, tensor in layer.tensors().items():
            assert_same(found.layers[name].tensors()[key].cpu(), tensor, 1e-4)


def test_a_resumed_run_ends_where_the_other_does(tiny_bert: str, tmp_path: Path) -> None:
    """The same ranks; sums on this device have no fixed order, so the weights are only close."""
    whole = make_task(tiny_bert, FWSVD("both", keep_ratio=0.4))
    fit(whole, tmp_path / "whole")
    half = make_task(tiny_bert, FWSVD("both", keep_ratio=0.4))
    stopped = fit(half, tmp_path / "half", max_epochs=1)
    resumed = make_task(tiny_bert, FWSVD("both", keep_ratio=0.4))
    trainer = make_trainer(tmp_path / "resumed", accelerator=DEVICE, max_epochs=2)
    trainer.fit(resumed, datamodule=SyntheticData(), ckpt_path=last_checkpoint(stopped))
    assert trainer.global_step == 12
    assert read_layout(resumed.encoder) == read_layout(whole.encoder)
    check(resumed)


def test_random_states_of_the_device_are_restored() -> None:
    torch.zeros(1, device=DEVICE)
    states = capture()
    first = torch.rand(8, device=DEVICE)
    restore(states, 0)
    assert torch.equal(torch.rand(8, device=DEVICE), first)


def test_one_process_of_ddp(tiny_bert: str, tmp_path: Path) -> None:
    """The collective operations run over NCCL, though there is nobody to talk to."""
    try:
        for name in ("kronecker", "rankdyna"):
            task = make_task(tiny_bert, STRATEGIES[name]())
            trainer = fit(task, tmp_path / name, strategy="ddp", devices=1)
            assert torch.distributed.get_backend() == ("nccl" if DEVICE == "cuda" else "gloo")
            assert trainer.global_step == 12
            check(task)
    finally:
        torch.distributed.destroy_process_group()


def test_one_process_of_fsdp2(tmp_path: Path) -> None:
    """Parameters are divided among nobody; what is trained is what a single device trains."""
    model = save_tiny_decoder("llama", tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(f"the film {index * index % 10}" for index in range(45)))
    products = []
    try:
        for name, parallel in (("one", None), ("other", divided(1))):
            task = CausalLM(str(model), strategy=SVD(keep_ratio=0.5), optimizer=optimizer)
            text = str(tmp_path / "text.txt")
            data = CausalText(str(model), train=text, validation=text, window=8, batch_size=8, eval_batch_size=8)
            more = {} if parallel is None else {"strategy": parallel, "devices": 1}
            trainer = make_trainer(tmp_path / name, accelerator=DEVICE, max_epochs=1, gradient_clip_val=1.0, **more)
            trainer.fit(task, data)
            assert is_sharded(task.encoder) == (parallel is not None)
            loaded = load_model(last_checkpoint(trainer))
            products.append(loaded.state_dict())
        assert torch.distributed.get_backend() == ("nccl" if DEVICE == "cuda" else "gloo")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    torch.testing.assert_close(products[1], products[0], rtol=0, atol=1e-5)


def test_a_compiled_model_computes_the_same(tiny_bert: str, tmp_path: Path) -> None:
    checkpoint(tiny_bert, tmp_path / "small.ckpt")
    check_engines(["compile"], DEVICE, "float32")
    loaded: Any = load_model(str(tmp_path / "small.ckpt"))
    model = loaded.to(DEVICE)
    ready = prepare(model, "compile", 1, tmp_path)
    for batch, length in ((2, 4), (3, 9)):
        inputs = {name: value.to(DEVICE) for name, value in inputs_for(model, batch, length).items()}
        found: Any = ready(inputs)()
        with torch.no_grad():
            torch.testing.assert_close(found.logits, model(**inputs).logits, atol=1e-4, rtol=1e-3)


def test_compiled_layers_train_through_changing_ranks(tiny_bert: str, tmp_path: Path) -> None:
    class CompiledLayers(SequenceClassification):
        def configure_model(self) -> None:
            super().configure_model()
            layers: Any = self.encoder.get_submodule("bert.encoder.layer")
            for block in layers:
                block.intermediate.dense.compile()

    task = CompiledLayers(tiny_bert, strategy=RankDyna(keep_ratio=0.4))
    fit(task, tmp_path, limit_val_batches=0)
    check(task)


def test_the_peak_of_memory_holds_weights_and_activations() -> None:
    class Wide(nn.Linear):
        @property
        def device(self) -> torch.device:
            return self.weight.device

    model: Any = Wide(256, 512).to(DEVICE)
    given = torch.ones(1024, 256, device=DEVICE)
    found = peak_memory(model, lambda: model(given))
    assert found is not None
    assert found >= weight_bytes(model) + 4 * 1024 * 512
