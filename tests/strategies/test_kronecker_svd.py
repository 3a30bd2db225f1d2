"""KroneckerSVD: what it writes, which ranks it gives, and what goes with it: groups of layers, recalibration."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from lowrank_pl.allocation import Global, LayerOverride, RankRequest, Uniform
from lowrank_pl.core import kronecker_groups, kronecker_svd
from lowrank_pl.errors.budget import AllocationError
from lowrank_pl.errors.numerics import MemoryBoundError, RangeError
from lowrank_pl.errors.run import FewSamplesError, ResumeMismatchError
from lowrank_pl.errors.targets import HeadError
from lowrank_pl.importance import SecondMoments
from lowrank_pl.nn import LowRankLinear, dense_weight
from lowrank_pl.strategies import FWSVD, SVD, TFWSVD, Calibration, CompressionStrategy, KroneckerSVD, Recalibration
from lowrank_pl.surgery import TargetSelector
from lowrank_pl.tasks import MaskedLM
from lowrank_pl.trainer import LowRankTrainer
from tests.support.runs import last_checkpoint, make_task, make_trainer
from tests.support.synthetic import SyntheticData

QUERY = "bert.encoder.layer.0.attention.self.query"


def products(task: Any) -> dict[str, Tensor]:
    return {n: m.product().detach().clone() for n, m in task.encoder.named_modules() if isinstance(m, LowRankLinear)}


def compressed(pretrained: str, folder: Path, strategy: CompressionStrategy, **data: Any) -> Any:
    task = make_task(pretrained, strategy)
    make_trainer(folder).compress(task, SyntheticData(**data), output=str(folder / "out"))
    return task


def measured(pretrained: str) -> tuple[Any, Any]:
    """The dense task and its second moments, measured apart from any run."""
    task = make_task(pretrained)
    task.build(SyntheticData().target)
    layers = TargetSelector().select(task.encoder)
    batches = SyntheticData().calibration_batches(8)
    return task, SecondMoments().measure(task.encoder, layers, batches, task.per_sample_losses)


@pytest.mark.parametrize("side", ["both", "input", "output"])
def test_factors_are_those_of_the_formula(tiny_bert: str, tmp_path: Path, side: Any) -> None:
    calibration = Calibration(cache=False)
    strategy = KroneckerSVD(side, keep_ratio=0.5, allocation=Uniform(), calibration=calibration, refit=False)
    found = products(compressed(tiny_bert, tmp_path, strategy))
    task, moments = measured(tiny_bert)
    assert len(found) == 12
    for name, product in found.items():
        layer = moments.layers[name]
        inputs = layer.inputs if side != "output" else None
        outputs = layer.outputs if side != "input" else None
        weight = task.encoder.get_submodule(name).weight.detach()
        rank = int(0.5 * weight.numel() / sum(weight.shape))
        expected = kronecker_svd(weight, rank, inputs, outputs).product()
        torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-5)


def test_global_ranks_are_those_of_the_energies(tiny_bert: str, tmp_path: Path) -> None:
    task = compressed(tiny_bert, tmp_path, KroneckerSVD(keep_ratio=0.4))
    dense, moments = measured(tiny_bert)
    layers = TargetSelector().select(dense.encoder)
    energies = {}
    for name, layer in layers.items():
        found = moments.layers[name]
        energies[name] = kronecker_groups(dense_weight(layer).detach(), found.inputs, found.outputs).energies
    request = RankRequest(TargetSelector.shapes(layers), keep_ratio=0.4)
    ranks = Global().allocate(request, energies).ranks
    told = {layer.name: layer.rank if layer.kind == "low_rank" else None for layer in task.compression.layers}
    assert told == ranks
    assert len(set(ranks.values())) > 3
    assert task.compression.targeted_kept <= 0.4 * task.compression.targeted_dense
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["options"]["allocation"] == {"class": "Global", "floor": 0.25, "vocabulary_floor": 1.0}
    assert report["options"]["calibration_samples"] == 48


def test_blocks_of_the_moments_are_taken_where_asked(tiny_bert: str, tmp_path: Path) -> None:
    strategy = KroneckerSVD(keep_ratio=0.5, allocation=Uniform(), block_size=16, refit=False)
    product = products(compressed(tiny_bert, tmp_path, strategy))[QUERY]
    task, moments = measured(tiny_bert)
    layer = moments.layers[QUERY]
    mask = torch.block_diag(*[torch.ones(16, 16)] * 2)
    weight = dense_weight(task.encoder.get_submodule(QUERY)).detach()
    expected = kronecker_svd(weight, 8, layer.inputs * mask, layer.outputs * mask).product()
    torch.testing.assert_close(product, expected, atol=1e-5, rtol=1e-4)


def test_fit_starts_from_what_compress_writes(tiny_bert: str, tmp_path: Path) -> None:
    class First(pl.Callback):
        found: dict[str, Tensor]

        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.found = products(pl_module)

    first = First()
    strategy = KroneckerSVD(keep_ratio=0.4)
    trainer = make_trainer(tmp_path, callbacks=[first], limit_train_batches=1)
    trainer.fit(make_task(tiny_bert, strategy), datamodule=SyntheticData())
    expected = products(compressed(tiny_bert, tmp_path / "compress", KroneckerSVD(keep_ratio=0.4)))
    assert first.found.keys() == expected.keys()
    assert all(torch.equal(product, expected[name]) for name, product in first.found.items())


def test_groups_of_layers_give_the_same_factors(tiny_bert: str, tmp_path: Path) -> None:
    whole = products(compressed(tiny_bert, tmp_path / "a", KroneckerSVD(keep_ratio=0.4)))
    calibration = Calibration(cache=False, max_memory=60_000 / 2**30)
    strategy = KroneckerSVD(keep_ratio=0.4, calibration=calibration)
    grouped = products(compressed(tiny_bert, tmp_path / "b", strategy))
    assert grouped.keys() == whole.keys()
    for name, product in whole.items():
        torch.testing.assert_close(grouped[name], product, rtol=1e-4, atol=1e-5)


def test_moments_of_a_single_sample_are_enough_for_finite_factors(tiny_bert: str, tmp_path: Path) -> None:
    strategy = KroneckerSVD(keep_ratio=0.4, calibration=Calibration(cache=False, max_samples=1))
    found = products(compressed(tiny_bert, tmp_path, strategy))
    assert found
    assert all(bool(product.isfinite().all()) for product in found.values())


def test_memory_below_one_layer_is_refused(tiny_bert: str, tmp_path: Path) -> None:
    strategy = KroneckerSVD(keep_ratio=0.4, calibration=Calibration(max_memory=1e-6))
    with pytest.raises(MemoryBoundError, match="query"):
        compressed(tiny_bert, tmp_path, strategy)


@pytest.mark.parametrize(
    "make",
    [lambda: FWSVD("both", keep_ratio=0.4, allocation=Global()), lambda: TFWSVD(keep_ratio=0.4, allocation=Global())],
)
def test_other_methods_of_the_loss_take_global_ranks(tiny_bert: str, tmp_path: Path, make: Any) -> None:
    record = compressed(tiny_bert, tmp_path, make()).compression
    assert record.targeted_kept <= 0.4 * record.targeted_dense
    assert len({layer.rank for layer in record.layers}) > 3


@pytest.mark.parametrize(
    "make",
    [
        lambda: SVD(keep_ratio=0.4, allocation=Global()),
        lambda: FWSVD("input", keep_ratio=0.4, allocation=Global()),
        lambda: KroneckerSVD("input", keep_ratio=0.4, allocation=Global()),
    ],
)
def test_global_ranks_are_refused_where_nothing_is_known_of_the_loss(make: Any) -> None:
    with pytest.raises(AllocationError, match="Uniform"):
        make()


def test_overrides_hold(tiny_bert: str, tmp_path: Path) -> None:
    overrides = [LayerOverride(QUERY, rank=3), LayerOverride("*.output.dense", dense=True)]
    record = compressed(tiny_bert, tmp_path, KroneckerSVD(keep_ratio=0.4, overrides=overrides)).compression
    layers = {layer.name: layer for layer in record.layers}
    assert (layers[QUERY].kind, layers[QUERY].rank) == ("low_rank", 3)
    assert all(layer.kind == "dense" for name, layer in layers.items() if name.endswith("output.dense"))


def test_resuming_with_other_options_is_refused(tiny_bert: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, limit_train_batches=2)
    trainer.fit(make_task(tiny_bert, KroneckerSVD(keep_ratio=0.4)), datamodule=SyntheticData())
    again = make_trainer(tmp_path, max_epochs=2)
    task = make_task(tiny_bert, KroneckerSVD(keep_ratio=0.4, damping=0.5))
    with pytest.raises(ResumeMismatchError, match=r"damping=0\.001 there, damping=0\.5 here"):
        again.fit(task, datamodule=SyntheticData(), ckpt_path=last_checkpoint(trainer))


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_recalibration_brings_outputs_closer_to_the_dense_model(tiny_bert: str, tmp_path: Path, kind: Any) -> None:
    data = SyntheticData(kind)
    dense, trainer = make_task(tiny_bert), make_trainer(tmp_path)
    trainer.fit(dense, datamodule=data)
    start = last_checkpoint(trainer)
    # An untrained model puts out nearly the same for every sample, and so may one that was trained this fast.
    checkpoint, generator = torch.load(start, weights_only=True), torch.Generator().manual_seed(0)
    for tensor in checkpoint["state_dict"].values():
        if tensor.ndim == 2:
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    torch.save(checkpoint, start)
    dense.load_state_dict(checkpoint["state_dict"])
    batches = list(data.calibration_batches(48))
    with torch.no_grad():
        wanted = torch.cat([dense.eval()(batch) for batch in batches])

    def distance(name: str, recalibration: Recalibration | None) -> tuple[float, Any]:
        strategy = KroneckerSVD("input", keep_ratio=0.15, recalibration=recalibration, refit=False)
        task = make_task(tiny_bert, strategy, init_from=start)
        make_trainer(tmp_path).compress(task, SyntheticData(kind), output=str(tmp_path / name))
        with torch.no_grad():
            outputs = torch.cat([task.eval()(batch) for batch in batches])
        if kind == "regression":
            return float((outputs - wanted).square().mean()), task
        given, expected = outputs.log_softmax(1), wanted.softmax(1)
        return float(torch.nn.functional.kl_div(given, expected, reduction="batchmean")), task

    plain, _ = distance("plain", None)
    closer, task = distance("closer", Recalibration())
    assert 1e-3 < closer < plain
    assert any(note.startswith("the head was recalibrated on 48 outputs") for note in task.compression.notes)


def test_recalibration_of_a_vocabulary_is_refused(
    tiny_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowrank_pl.strategies.recalibration._MOST_OUTPUTS", 50)
    pl.seed_everything(0, verbose=False)
    task = MaskedLM(tiny_bert, strategy=KroneckerSVD(keep_ratio=0.5, recalibration=Recalibration()))
    with pytest.raises(HeadError, match="more than 50"):
        make_trainer(tmp_path).compress(task, SyntheticData("masked_lm"), output=str(tmp_path / "out"))


def test_recalibration_needs_a_sample_on_every_process(tiny_bert: str) -> None:
    task, samples = make_task(tiny_bert), Calibration(max_samples=1)
    for rank in (0, 1):  # both are told, so none is left waiting
        trainer: Any = SimpleNamespace(datamodule=SyntheticData(), global_rank=rank, world_size=2)
        with pytest.raises(FewSamplesError, match=r"there are 1 for 2 of them.*max_samples to 2"):
            Recalibration().check(trainer, task, samples)


def test_what_recalibration_needs_is_looked_at_before_anything_is_measured_in_fit_too(
    tiny_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise FewSamplesError("recalibration", 1, 2)

    measured: list[str] = []
    monkeypatch.setattr(Recalibration, "check", refused)
    monkeypatch.setattr(Recalibration, "outputs", lambda *_: measured.append("outputs"))
    monkeypatch.setattr(SecondMoments, "measure", lambda *_: measured.append("moments"))
    task = make_task(tiny_bert, KroneckerSVD(keep_ratio=0.5, recalibration=True))
    with pytest.raises(FewSamplesError):
        make_trainer(tmp_path).fit(task, SyntheticData())
    assert not measured


@pytest.mark.parametrize("options", [{}, {"side": "input", "sequential": True}])
def test_blocks_that_do_not_fit_are_refused_before_the_dense_model_is_scored(
    options: dict[str, Any], tiny_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LowRankTrainer, "validate", lambda *_, **__: pytest.fail("scored"))
    task = make_task(tiny_bert, KroneckerSVD(keep_ratio=0.5, block_size=24, **options))
    with pytest.raises(RangeError, match=r"block_size.*a divisor of 32, the features of 'bert\.encoder\.layer\.0"):
        make_trainer(tmp_path).compress(task, SyntheticData(), output=str(tmp_path / "out"))


def test_bad_options_are_refused() -> None:
    for size, diagonal in ((0, False), (8, True)):
        with pytest.raises(RangeError, match="block_size"):
            KroneckerSVD(keep_ratio=0.5, block_size=size, diagonal=diagonal)
    with pytest.raises(RangeError, match="damping"):
        KroneckerSVD(keep_ratio=0.5, damping=-1)
    with pytest.raises(RangeError, match="side"):
        KroneckerSVD("left", keep_ratio=0.5)  # type: ignore[arg-type]
    with pytest.raises(RangeError, match="max_samples"):
        Recalibration(0)
    with pytest.raises(RangeError, match="max_memory"):
        Calibration(max_memory=0)


def test_inspect_says_that_ranks_follow_from_data(tiny_bert: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = "ranks follow from the calibration data"
    for strategy, expected in ((KroneckerSVD(keep_ratio=0.4), True), (SVD(keep_ratio=0.4), False)):
        LowRankTrainer(logger=False).inspect(make_task(tiny_bert, strategy))
        assert (told in capsys.readouterr().out) is expected


def test_it_says_beforehand_what_measuring_takes(tiny_bert: str) -> None:
    task = make_task(tiny_bert, KroneckerSVD(keep_ratio=0.5, calibration=Calibration(max_memory=0.0001)))
    task.build()
    shapes = task.strategy.targets.shapes(task.strategy.targets.select(task.encoder))
    groups = SecondMoments().groups(shapes, 0.0001)
    most = max(sum(8 * (shapes[n].in_features ** 2 + shapes[n].out_features ** 2) for n in names) for names in groups)
    assert task.strategy.told_beforehand(task.encoder, 4, None) == [
        f"KroneckerSVD measures the layers in {len(groups)} passes over the calibration samples: at most "
        f"{most / 2**20:,.1f} MiB of sums at a time, which calibration.max_memory bounds"
    ]
    assert SVD(keep_ratio=0.5).told_beforehand(task.encoder, 4, None) == []
