"""The vocabulary's matrix among the targets of a strategy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_pl.allocation import Flops, LayerOverride, Uniform
from lowrank_pl.core import kronecker_groups, truncated_svd
from lowrank_pl.errors.run import EmbeddingsError
from lowrank_pl.errors.targets import HeadError
from lowrank_pl.importance import SecondMoments
from lowrank_pl.nn import LowRankEmbedding, dense_shape, dense_weight
from lowrank_pl.strategies import (
    FWSVD,
    SVD,
    TFWSVD,
    Calibration,
    CompressionStrategy,
    KroneckerSVD,
    NoCompression,
    RankDyna,
    Recalibration,
)
from lowrank_pl.surgery import TargetSelector, tied_heads
from lowrank_pl.tasks import MaskedLM
from lowrank_pl.trainer.diagnoser import Diagnoser
from tests.core.matrices import random_matrix
from tests.support.runs import last_checkpoint, make_task, make_trainer
from tests.support.synthetic import SyntheticData

WORDS, DECODER = "bert.embeddings.word_embeddings", "cls.predictions.decoder"
BOTH, ALONE = TargetSelector(embeddings=True), TargetSelector([], embeddings=True)
FRESH = Calibration(cache=False)


def compressed(task: Any, folder: Path, kind: Any = "classification") -> Any:
    make_trainer(folder, logger=False).compress(task, SyntheticData(kind), output=str(folder / "out"))
    return task.eval()


def dense_and_moments(pretrained: str) -> tuple[Any, Any]:
    task = make_task(pretrained)
    task.build(SyntheticData().target)
    layers = BOTH.select(task.encoder)
    batches = SyntheticData().calibration_batches(8)
    return task, SecondMoments().measure(task.encoder, layers, batches, task.per_sample_losses).layers


def test_with_equal_frequencies_and_gradients_the_metric_is_plain_svd() -> None:
    weight = random_matrix(4, 9)
    groups = kronecker_groups(weight, torch.full((9,), 1 / 9), torch.eye(4), damping=0)
    torch.testing.assert_close(groups.factors(2).product(), truncated_svd(weight, 2).product())


def test_no_other_factors_of_the_rank_are_better_in_the_metric() -> None:
    """Alternating least squares from many starts, in the norm written out token by token."""
    weight, frequencies = random_matrix(4, 9).double(), torch.rand(9, dtype=torch.float64) + 0.01
    root = random_matrix(4, 4, seed=5).double()
    moment = root @ root.mT

    def error(product: torch.Tensor) -> float:
        rows = (weight - product).mT
        return float(sum(share * row @ moment @ row for share, row in zip(frequencies, rows, strict=True)))

    found = error(kronecker_groups(weight, frequencies, moment, damping=0).factors(2).product())
    half = torch.linalg.cholesky(moment).mT
    for seed in range(5):
        left = random_matrix(4, 2, seed=seed + 10).double()
        for _ in range(200):
            right = torch.linalg.lstsq(half @ left, half @ weight).solution
            scaled = frequencies.sqrt() * right
            left = torch.linalg.lstsq(scaled.mT, (frequencies.sqrt() * weight).mT).solution.mT
        assert found <= error(left @ right) * (1 + 1e-6)


def test_the_factors_and_the_budget_are_those_of_the_formula(tiny_bert: str, tmp_path: Path) -> None:
    strategy = KroneckerSVD(keep_ratio=0.4, targets=BOTH, calibration=FRESH, refit=False, allocation=Uniform())
    task = compressed(make_task(tiny_bert, strategy), tmp_path)
    dense, moments = dense_and_moments(tiny_bert)
    form = task.encoder.get_submodule(WORDS)
    assert isinstance(form, LowRankEmbedding)
    weight = dense_weight(dense.encoder.get_submodule(WORDS)).detach()
    groups = kronecker_groups(weight, moments[WORDS].inputs, moments[WORDS].outputs)
    torch.testing.assert_close(form.product(), groups.factors(form.rank).product(), rtol=1e-4, atol=1e-6)
    record = task.compression
    assert record.layers[0].name == WORDS
    assert (record.layers[0].kind, record.layers[0].rank) == ("low_rank_embedding", form.rank)
    assert record.targeted_dense == sum(dense_shape(m).dense_params for m in BOTH.select(dense.encoder).values())
    assert 0.36 < record.keep_ratio <= 0.4


def test_energies_are_the_second_order_rise_of_the_loss_as_for_linears(tiny_bert: str) -> None:
    """A look-up and a linear layer of the same one-hot inputs are the same to the metric: one unit for both."""
    dense, moments = dense_and_moments(tiny_bert)
    weight, of = dense_weight(dense.encoder.get_submodule(WORDS)).detach().double(), moments[WORDS]
    inputs, outputs = of.inputs.double(), of.outputs.double()
    assert float(inputs.sum()) == pytest.approx(1, abs=1e-5)  # a mean over tokens, as that of linears
    total = kronecker_groups(weight, torch.diag(inputs), outputs, damping=0).energies.sum()
    assert float(total) == pytest.approx(float((outputs @ (weight * inputs) @ weight.mT).trace()), rel=1e-6)
    apart = kronecker_groups(weight, inputs, outputs, damping=0).energies.sum()
    assert float(apart) == pytest.approx(float(total), rel=1e-6)


@pytest.mark.parametrize("options", [{"side": "input"}, {"side": "output"}, {"diagonal": True}, {"block_size": 16}])
def test_options_of_the_metric_work_with_a_vocabulary(tiny_bert: str, tmp_path: Path, options: Any) -> None:
    strategy = KroneckerSVD(keep_ratio=0.5, targets=ALONE, calibration=FRESH, **options)
    task = compressed(make_task(tiny_bert, strategy), tmp_path)
    [record] = task.compression.layers
    assert record.kind == "low_rank_embedding"
    assert "refit" not in " ".join(task.compression.notes)  # nothing else was factorised


def test_overrides_and_uniform_ranks_name_the_vocabulary(tiny_bert: str, tmp_path: Path) -> None:
    exceptions = [LayerOverride("*word_embeddings", rank=7)]
    strategy = SVD(keep_ratio=0.5, targets=BOTH, overrides=exceptions, multiple_of=4)
    task = compressed(make_task(tiny_bert, strategy), tmp_path)
    form = task.encoder.get_submodule(WORDS)
    dense = make_task(tiny_bert)
    dense.build(SyntheticData().target)
    best = truncated_svd(dense.encoder.get_submodule(WORDS).weight.detach(), 7).product()
    torch.testing.assert_close(form.weight + 0, best, rtol=1e-4, atol=1e-6)
    assert all(layer.rank % 4 == 0 for layer in task.compression.layers[1:])


def test_linears_are_refitted_to_what_the_factorised_look_up_puts_out(tiny_bert: str, tmp_path: Path) -> None:
    def run(refit: bool, folder: str) -> Any:
        strategy = KroneckerSVD(keep_ratio=0.3, targets=BOTH, calibration=FRESH, allocation=Uniform(), refit=refit)
        return compressed(make_task(tiny_bert, strategy), tmp_path / folder)

    dense = make_task(tiny_bert)
    dense.build(SyntheticData().target)
    (batch,) = SyntheticData().calibration_batches(48)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    fitted, plain = run(True, "fitted"), run(False, "plain")
    assert torch.equal(fitted.encoder.get_submodule(WORDS).weight + 0, plain.encoder.get_submodule(WORDS).weight + 0)
    assert any("12 layers were refitted" in note for note in fitted.compression.notes)
    mask = batch["attention_mask"].bool()

    def distance(task: Any) -> float:
        with torch.no_grad():
            states = [model.eval().bert(**inputs).last_hidden_state[mask] for model in (task.encoder, dense.encoder)]
        return float((states[0] - states[1]).norm())

    assert distance(fitted) < distance(plain)


def half() -> KroneckerSVD:
    return KroneckerSVD(keep_ratio=0.5, targets=BOTH, calibration=FRESH, allocation=Uniform())


def language_model(pretrained: str, strategy: CompressionStrategy) -> Any:
    return MaskedLM(pretrained, strategy=strategy, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2))


def test_a_tied_head_is_tuned_and_saved_with_the_look_up(tiny_bert: str, tmp_path: Path) -> None:
    task, data = language_model(tiny_bert, half()), SyntheticData("masked_lm", size=16)
    trainer = make_trainer(tmp_path)
    trainer.fit(task, datamodule=data)
    assert tied_heads(task.encoder) == {DECODER: WORDS}
    tuned = copy.deepcopy(task.encoder.state_dict())
    assert torch.equal(tuned[f"{DECODER}.left.weight"], tuned[f"{WORDS}.left.weight"])
    again = MaskedLM.load_from_checkpoint(last_checkpoint(trainer), weights_only=True)
    again.configure_model()
    assert tied_heads(again.encoder) == {DECODER: WORDS}
    assert all(torch.equal(value, tuned[name]) for name, value in again.encoder.state_dict().items())
    resumed = language_model(tiny_bert, half())
    longer = make_trainer(tmp_path / "longer", max_epochs=2)
    longer.fit(resumed, datamodule=data, ckpt_path=last_checkpoint(trainer))
    assert tied_heads(resumed.encoder) == {DECODER: WORDS}
    assert not torch.equal(resumed.encoder.state_dict()[f"{WORDS}.left.weight"], tuned[f"{WORDS}.left.weight"])


def test_what_fails_after_the_exchange_leaves_the_model_dense_and_tied(
    tiny_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise MemoryError("none left")

    monkeypatch.setattr("lowrank_pl.strategies.refit.Refit.fit_", fail)
    task = language_model(tiny_bert, half())
    with pytest.raises(MemoryError):
        compressed(task, tmp_path, "masked_lm")
    decoder, words = task.encoder.get_submodule(DECODER), task.encoder.get_submodule(WORDS)
    assert type(words) is torch.nn.Embedding
    assert decoder.weight is words.weight
    assert decoder.bias is task.encoder.cls.predictions.bias


def test_a_tied_head_is_not_recalibrated(tiny_bert: str, tmp_path: Path) -> None:
    strategy = SVD(keep_ratio=0.5, targets=BOTH, recalibration=Recalibration())
    with pytest.raises(HeadError, match="has the matrix of the vocabulary"):
        compressed(language_model(tiny_bert, strategy), tmp_path, "masked_lm")


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: FWSVD(keep_ratio=0.5, targets=BOTH), "FWSVD, .*zero for every token that"),
    (lambda: TFWSVD(keep_ratio=0.5, targets=BOTH), "TFWSVD, .*zero for every token that"),
    (lambda: RankDyna(keep_ratio=0.5, targets=BOTH), "RankDyna, .*with KroneckerSVD and targets.include="),
    (lambda: NoCompression(targets=BOTH), "NoCompression, .*linear layers alone"),
    (lambda: SVD(keep_ratio=0.5, targets=BOTH, cost=Flops()), "SVD with cost Flops, .*a dense look-up costs nothing"),
    (lambda: Diagnoser(0.5, SVD(keep_ratio=0.5, targets=BOTH)), "diagnose, .*linear layers alone"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_what_cannot_factorise_a_vocabulary_says_so_at_once(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(EmbeddingsError, match=message):
        make()
