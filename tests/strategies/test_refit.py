"""Left factors fitted anew: what they solve, layer by layer, and that outputs come closer to the dense model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_pl import compress
from lowrank_pl.allocation import Uniform
from lowrank_pl.errors import LowRankError
from lowrank_pl.errors.labels import LabelsError
from lowrank_pl.errors.numerics import NonFiniteError, RangeError
from lowrank_pl.errors.run import ResumeMismatchError
from lowrank_pl.strategies import SVD, Calibration, CompressionStrategy, KroneckerSVD, Refit, refit
from lowrank_pl.strategies.calibration import calibration_batches
from lowrank_pl.surgery import TargetSelector
from lowrank_pl.tasks import SequenceClassification
from tests.support.runs import last_checkpoint, make_task, make_trainer
from tests.support.synthetic import SyntheticData
from tests.support.tiny import save_tiny_model

FIRST = [f"bert.encoder.layer.0.attention.self.{part}" for part in ("query", "key", "value")]


def factorised(pretrained: str, folder: Path, strategy: CompressionStrategy) -> Any:
    task = make_task(pretrained, strategy)
    make_trainer(folder, logger=False, max_epochs=0).fit(task, datamodule=SyntheticData())
    return task.eval()


def strategy(refit: Refit | bool | None, keep_ratio: float = 0.3) -> KroneckerSVD:
    calibration = Calibration(cache=False, batch_size=16)
    return KroneckerSVD("input", keep_ratio, allocation=Uniform(), calibration=calibration, damping=0, refit=refit)


def dense_layers(pretrained: str) -> tuple[Any, dict[str, nn.Module]]:
    task = make_task(pretrained)
    task.build(SyntheticData().target)
    return task.eval(), TargetSelector().select(task.encoder)


def inputs_of(task: Any, name: str, batch: dict[str, Tensor]) -> Tensor:
    """What a layer gets, `[tokens, n]`, tokens that are no padding."""
    seen: list[Tensor] = []
    handle = task.encoder.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        task(batch)
    handle.remove()
    return seen[0][batch["attention_mask"].bool()].double()


def test_each_layer_is_the_least_squares_fit_on_the_inputs_it_has(tiny_bert: str, tmp_path: Path) -> None:
    task = factorised(tiny_bert, tmp_path, strategy(Refit()))
    dense, layers = dense_layers(tiny_bert)
    (batch,) = SyntheticData().calibration_batches(48)
    for name in ("bert.encoder.layer.0.output.dense", "bert.encoder.layer.1.attention.self.key"):
        layer = task.encoder.get_submodule(name)
        # Layers behind it do not change what it gets, so the finished model shows what it was fitted to.
        z = inputs_of(task, name, batch) @ layer.right.weight.detach().double().mT
        z = torch.cat([z, torch.ones(len(z), 1)], 1)
        x = inputs_of(dense, name, batch)
        wanted = x @ layers[name].get_parameter("weight").detach().double().mT
        best = torch.linalg.lstsq(z, wanted).solution
        bias = (layer.bias - layers[name].get_parameter("bias")).detach().double()
        found = torch.cat([layer.left.weight.detach().double().mT, bias[None]])

        def error(solution: Tensor, z: Tensor = z, wanted: Tensor = wanted) -> float:
            return float((z @ solution - wanted).square().sum())

        assert error(found) <= error(best) * (1 + 1e-2)


def test_the_first_layers_get_what_they_were_factorised_for(tiny_bert: str, tmp_path: Path) -> None:
    # Their inputs do not change, so only what the head never looks at, and the bias, can differ.
    task = factorised(tiny_bert, tmp_path / "a", strategy(Refit()))
    plain = factorised(tiny_bert, tmp_path / "b", strategy(None))
    dense, layers = dense_layers(tiny_bert)
    (batch,) = SyntheticData().calibration_batches(48)
    for name in FIRST:
        x = inputs_of(dense, name, batch)
        before, after = (one.encoder.get_submodule(name) for one in (plain, task))
        wanted = x @ layers[name].get_parameter("weight").detach().double().mT

        def error(layer: Any, name: str = name, x: Tensor = x, wanted: Tensor = wanted) -> float:
            bias = (layer.bias - layers[name].get_parameter("bias")).detach().double()
            return float((x @ layer.product().detach().double().mT + bias - wanted).square().sum())

        assert error(after) <= error(before) * (1 + 1e-6)
        assert error(after) > 0.9 * error(before)


@pytest.mark.parametrize("make", [strategy, lambda refit: SVD(keep_ratio=0.3, refit=refit)])
def test_hidden_states_come_closer_to_the_dense_model(tiny_bert: str, make: Any, tmp_path: Path) -> None:
    dense, _ = dense_layers(tiny_bert)
    data = SyntheticData()
    batches = list(data.calibration_batches(48))

    def states(task: Any) -> Tensor:
        with torch.no_grad():
            return torch.cat([task.encoder.base_model(b["input_ids"], b["attention_mask"])[0][:, 0] for b in batches])

    wanted = states(dense)
    plain, closer = (factorised(tiny_bert, tmp_path, make(refit)) for refit in (False, True))
    distances = [float((states(task) - wanted).square().mean()) for task in (plain, closer)]
    assert distances[1] < 0.9 * distances[0]
    (note,) = (note for note in closer.compression.notes if "refitted" in note)
    assert note.endswith(f"{len(closer.compression.layers)} layers were refitted on 48 samples")
    assert all(layer.weighted_error is None for layer in closer.compression.layers)
    first = closer.compression.layers[0]
    made, was = closer.encoder.get_submodule(first.name), dense.encoder.get_submodule(first.name).weight
    assert first.error == pytest.approx(float((made.product() - was).norm() / was.norm()), rel=1e-4)


def test_layers_that_are_called_several_times_stay(tmp_path: Path) -> None:
    pretrained = str(save_tiny_model("albert", tmp_path / "model"))
    plain, task = (factorised(pretrained, tmp_path, strategy(refit)) for refit in (False, True))
    state = task.encoder.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in plain.encoder.state_dict().items())
    (note,) = (note for note in task.compression.notes if "refitted" in note)
    assert "of 0 layers were refitted" in note
    assert note.endswith("6 that are called several times, never, or for other tokens were not")


def test_nothing_is_left_behind(tiny_bert: str, tmp_path: Path) -> None:
    task = factorised(tiny_bert, tmp_path, strategy(Refit(16)))
    again = factorised(tiny_bert, tmp_path, strategy(Refit(16)))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in task.encoder.modules())
    assert all(parameter.requires_grad for parameter in task.encoder.parameters())
    states = task.encoder.state_dict(), again.encoder.state_dict()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_resuming_with_another_refit_is_refused(tiny_bert: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, limit_train_batches=2)
    trainer.fit(make_task(tiny_bert, strategy(Refit(16))), datamodule=SyntheticData())
    again = make_trainer(tmp_path, max_epochs=2)
    with pytest.raises(ResumeMismatchError, match=r"refit=\{'max_samples': 16\} there"):
        again.fit(make_task(tiny_bert, strategy(None)), SyntheticData(), ckpt_path=last_checkpoint(trainer))


class Routed(nn.Module):
    """Sends every token to one of two experts, by what it has become."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 6)])
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        first = x[:, 0] > x[:, 1]
        result = torch.zeros_like(x)
        for expert, chosen in zip(self.experts, (first, ~first), strict=True):
            if bool(chosen.any()):
                result[chosen] = expert(x[chosen])
        found: Tensor = self.head(result)
        return found


def cross_entropies(model: nn.Module, batch: Any) -> Tensor:
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def vectors(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 6, generator=generator), torch.arange(8) % 2) for _ in range(count)]


def test_layers_that_get_other_tokens_stay_as_they_are() -> None:
    torch.manual_seed(0)
    model, calibration = Routed(), Calibration(cache=False)
    record = compress(model, vectors(), cross_entropies, SVD(keep_ratio=0.7, refit=True, calibration=calibration))
    assert {layer.name for layer in record.layers} == {"blocks.0", "experts.0", "experts.1"}
    (note,) = (note for note in record.notes if "refitted" in note)
    assert "of 1 layers were refitted" in note
    assert note.endswith("2 that are called several times, never, or for other tokens were not")


def test_activations_that_are_infinite_are_refused() -> None:
    torch.manual_seed(0)
    model, batches = Routed(), vectors()
    batches[-1][0][3, 2] = torch.inf
    before = dict(model.named_modules())
    with pytest.raises(NonFiniteError, match=r"an activation in block 'blocks\.0', which .*, of layer 'blocks\.0'"):
        compress(model, batches, cross_entropies, SVD(keep_ratio=0.7, refit=True, calibration=Calibration(cache=False)))
    assert dict(model.named_modules()) == before


def test_attention_with_a_fast_path_is_refitted() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True)
    model = nn.ModuleDict({"body": nn.TransformerEncoder(layer, 2), "head": nn.Linear(6, 2)})

    def loss(model: Any, batch: Any) -> Tensor:
        x, labels = batch
        padding = torch.tensor([[False, False, True]]).expand(len(x), -1)
        states = model["body"](x[:, None].expand(-1, 3, -1), src_key_padding_mask=padding)
        return torch.nn.functional.cross_entropy(model["head"](states[:, 0]), labels, reduction="none")

    fast = torch.backends.mha.get_fastpath_enabled()
    record = compress(model, vectors(), loss, KroneckerSVD(keep_ratio=0.5, calibration=Calibration(cache=False)))
    assert any("refitted" in note for note in record.notes)
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_a_model_under_autocast_is_refitted_by_whole_passes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(6, 6)])}), nn.Linear(6, 2))

    def loss(model: Any, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model[2](model[1]["blocks"][0](model[0](batch[0])))
        return torch.nn.functional.cross_entropy(logits.float(), batch[1], reduction="none")

    record = compress(model, vectors(), loss, SVD(keep_ratio=0.7, refit=True, calibration=Calibration(cache=False)))
    assert any("of 1 layers were refitted" in note for note in record.notes)


@pytest.mark.parametrize("batches", [None, vectors()])
def test_a_refit_that_fails_leaves_the_model_dense(batches: Any) -> None:
    torch.manual_seed(0)
    model = Routed()
    before = dict(model.named_modules())
    with pytest.raises(LowRankError):
        compress(model, batches, None, SVD(keep_ratio=0.7, refit=True))
    assert dict(model.named_modules()) == before


def test_samples_without_labels_are_refused_with_the_remedy(
    tiny_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stripped(SequenceClassification):
        def per_sample_losses(self, batch: Any) -> Tensor:
            pytest.fail("losses were asked for without labels")

    task = Stripped(tiny_bert, strategy=SVD(keep_ratio=0.5, refit=True))
    monkeypatch.setattr(refit, "calibration_batches", lambda *asked: _Without(calibration_batches(*asked)))
    with pytest.raises(LabelsError, match="the calibration batches have no labels"):
        make_trainer(tmp_path, logger=False, max_epochs=0).fit(task, datamodule=SyntheticData())


class _Without:
    """Batches without their labels."""

    def __init__(self, batches: Any) -> None:
        self._batches = batches
        self.num_samples = batches.num_samples

    def __iter__(self) -> Any:
        for batch in self._batches:
            yield {name: tensor for name, tensor in batch.items() if name != "labels"}


def test_bad_options_are_refused() -> None:
    for wrong in (1, "false"):
        with pytest.raises(RangeError, match="refit"):
            KroneckerSVD(keep_ratio=0.5, refit=wrong)  # type: ignore[arg-type]
    with pytest.raises(RangeError, match=r"refit\.max_samples"):
        Refit(0)
