"""Building, loading and refusing, of the module around the encoder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file

from lowrank_pl.checkpoint import LAYOUT_KEY
from lowrank_pl.contract import TargetSpec
from lowrank_pl.errors.arguments import MissingArgumentError
from lowrank_pl.errors.checkpoint import CheckpointMismatchError, LayoutVersionError, NotACheckpointError
from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.errors.run import MonitorModeError, TargetKindError
from lowrank_pl.strategies import SVD
from lowrank_pl.surgery import ModelLayout, conform_, read_layout
from lowrank_pl.tasks import MaskedLM, SequenceClassification, TokenClassification
from lowrank_pl.tasks.optimization import decay_groups, linear_warmup_decay
from tests.support.runs import last_checkpoint, make_task, make_trainer
from tests.support.synthetic import SyntheticData
from tests.support.tiny import save_tiny_model


def fitted(pretrained: str, folder: Path, **arguments: Any) -> tuple[Any, str]:
    task = make_task(pretrained, **arguments)
    trainer = make_trainer(folder)
    trainer.fit(task, datamodule=SyntheticData())
    return task, last_checkpoint(trainer)


def test_head_follows_the_labels(tiny_bert: str) -> None:
    task = SequenceClassification(tiny_bert)
    task.build(TargetSpec("seasons", "classification", ("spring", "summer", "autumn", "winter")))
    assert task.encoder.config.id2label == {0: "spring", 1: "summer", 2: "autumn", 3: "winter"}
    task.build(TargetSpec("height", "regression", (), ("pearson",)))
    assert task.encoder.config.num_labels == 1
    assert task.encoder.training


@pytest.mark.parametrize(("kind", "make"), [("token_classification", TokenClassification), ("masked_lm", MaskedLM)])
def test_the_loss_of_a_validation_does_not_depend_on_its_batches(
    tiny_bert: str, tmp_path: Path, kind: Any, make: Any
) -> None:
    task = make(tiny_bert)
    losses = []
    for size in (1, 5, 24):
        data = SyntheticData(kind, batch_size=size)
        (found,) = make_trainer(tmp_path).validate(task, data, verbose=False)
        losses.append(found["val/loss"])
    batch = next(iter(data.val_dataloader()))
    expected = task.training_loss(task.eval()(batch), batch["labels"])  # all samples in one
    assert losses == pytest.approx([float(expected)] * 3, rel=1e-5)


def test_init_from_starts_a_new_run_with_the_same_function(tiny_bert: str, tmp_path: Path) -> None:
    task, path = fitted(tiny_bert, tmp_path, strategy=SVD(keep_ratio=0.5))
    other = make_task(None, init_from=path)
    other.build()
    batch = next(iter(SyntheticData().val_dataloader()))
    assert torch.equal(other.eval()(batch), task.eval()(batch))
    assert not other.freshly_initialised_head


def test_init_from_a_factorised_hugging_face_folder(tiny_bert: str, tmp_path: Path) -> None:
    import json

    task, _ = fitted(tiny_bert, tmp_path, strategy=SVD(keep_ratio=0.5))
    folder = tmp_path / "exported"
    folder.mkdir()
    fields = {**json.loads(task.encoder.config.to_json_string()), LAYOUT_KEY: read_layout(task.encoder).to_dict()}
    (folder / "config.json").write_text(json.dumps(fields))
    save_file({n: t.contiguous() for n, t in task.encoder.state_dict().items()}, folder / "model.safetensors")
    other = make_task(None, init_from=str(folder))
    other.build(SyntheticData().target)
    batch = next(iter(SyntheticData().val_dataloader()))
    assert torch.equal(other.eval()(batch), task.eval()(batch))


def test_resuming_tells_ignored_settings(tiny_bert: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, path = fitted(tiny_bert, tmp_path)
    task = make_task(tiny_bert, optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.5))
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, max_epochs=2).fit(task, datamodule=SyntheticData(), ckpt_path=path)
    assert "initial_lr=0.5 of parameter group 0 is ignored for the checkpoint's 0.01" in caplog.text


def test_resuming_with_the_same_settings_is_silent(
    tiny_bert: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, path = fitted(tiny_bert, tmp_path)
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, max_epochs=2).fit(make_task(tiny_bert), datamodule=SyntheticData(), ckpt_path=path)
    assert "is ignored" not in caplog.text


def test_checkpoint_of_another_architecture_is_refused(tiny_bert: str, tmp_path: Path) -> None:
    _, path = fitted(tiny_bert, tmp_path)
    other = SequenceClassification(str(save_tiny_model("distilbert", tmp_path / "distil")))
    with pytest.raises(CheckpointMismatchError, match=r"it is a bert with .* is a distilbert with"):
        make_trainer(tmp_path).test(other, SyntheticData(), ckpt_path=path, verbose=False)


def test_checkpoint_with_other_shapes_is_refused(tiny_bert: str, tmp_path: Path) -> None:
    task, path = fitted(tiny_bert, tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["encoder.classifier.weight"] = torch.zeros(3, 32)
    torch.save(checkpoint, tmp_path / "other.ckpt")
    other = make_task(None, init_from=str(tmp_path / "other.ckpt"))
    with pytest.raises(CheckpointMismatchError, match=r"'classifier.weight' is \[3, 32\] there and \[2, 32\] here"):
        other.build()
    assert task.encoder.config.num_labels == 2


def test_checkpoint_for_other_labels_is_refused(tiny_bert: str, tmp_path: Path) -> None:
    _, path = fitted(tiny_bert, tmp_path)
    other = make_task(None, init_from=path)
    with pytest.raises(CheckpointMismatchError, match=r"predicts 2 labels of 'synthetic'.*'seasons' have 4"):
        other.build(TargetSpec("seasons", "classification", ("a", "b", "c", "d")))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "no such file"),
        (b"garbage", "not a readable checkpoint"),
        ({"state_dict": {}}, "no 'lowrank_task'"),
        (Path("code"), r"\(Weights only load failed\)\. Allowed"),
    ],
)
def test_unreadable_init_from(content: Any, told: str, tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(NotACheckpointError, match=told):
        make_task(None, init_from=str(path)).build()


def test_empty_folder_as_init_from(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpointError, match=r"neither model\.ckpt nor config\.json"):
        make_task(None, init_from=str(tmp_path)).build()


def test_layout_of_another_version_is_refused(tiny_bert: str, tmp_path: Path) -> None:
    _, path = fitted(tiny_bert, tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint[LAYOUT_KEY]["version"] = 99
    torch.save(checkpoint, tmp_path / "new.ckpt")
    with pytest.raises(LayoutVersionError, match="version 99"):
        make_task(None, init_from=str(tmp_path / "new.ckpt")).build()


def test_classes_in_another_order_are_refused(tiny_bert: str, tmp_path: Path) -> None:
    _, path = fitted(tiny_bert, tmp_path)
    other = make_task(None, init_from=path)
    with pytest.raises(
        CheckpointMismatchError, match=r"order \['no', 'yes'\], the data's in the order \['yes', 'no'\]"
    ):
        other.build(TargetSpec("synthetic", "classification", ("yes", "no")))


def save_folder(task: Any, folder: Path) -> str:
    task.encoder.save_pretrained(folder)
    return str(folder)


def test_hugging_face_folder_with_another_head_is_refused(tiny_bert: str, tmp_path: Path) -> None:
    task = make_task(tiny_bert)
    task.build(TargetSpec("nli", "classification", ("entailment", "neutral", "contradiction")))
    folder = save_folder(task, tmp_path / "nli")
    with pytest.raises(CheckpointMismatchError, match="predicts 3 labels"):
        make_task(None, init_from=folder).build(SyntheticData().target)
    swapped = TargetSpec("nli", "classification", ("contradiction", "neutral", "entailment"))
    with pytest.raises(CheckpointMismatchError, match="stand in the order"):
        make_task(None, init_from=folder).build(swapped)
    make_task(None, init_from=folder).build(task.target)


def test_hugging_face_folder_that_lacks_a_head_is_refused(tiny_bert: str) -> None:
    with pytest.raises(CheckpointMismatchError, match=r"missing 'bert\.pooler.*unexpected 'cls\.predictions"):
        make_task(None, init_from=tiny_bert).build(SyntheticData().target)


def test_hugging_face_folder_with_the_names_of_old_files(tiny_bert: str, tmp_path: Path) -> None:
    task = make_task(tiny_bert)
    task.build(SyntheticData().target)
    folder = save_folder(task, tmp_path / "old")
    state = {n: t.clone() for n, t in task.encoder.state_dict().items()}
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in state.items()
    }
    save_file(old, Path(folder) / "model.safetensors", metadata={"format": "pt"})
    other = make_task(None, init_from=folder)
    other.build(SyntheticData().target)
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.encoder.state_dict().items())


def test_pretrained_with_another_head_gets_a_new_one(tiny_bert: str, tmp_path: Path) -> None:
    task = make_task(tiny_bert)
    task.build(TargetSpec("nli", "classification", ("entailment", "neutral", "contradiction")))
    other = make_task(save_folder(task, tmp_path / "nli"))
    other.build(SyntheticData().target)
    assert other.freshly_initialised_head
    assert other.encoder.classifier.weight.shape == (2, 32)
    assert torch.equal(other.encoder.bert.pooler.dense.weight, task.encoder.bert.pooler.dense.weight)


def test_half_precision_weights_train_in_the_trainers_precision(tiny_bert: str, tmp_path: Path) -> None:
    task = make_task(tiny_bert)
    task.build(SyntheticData().target)
    task.encoder.half()
    folder = save_folder(task, tmp_path / "half")
    for other in (SequenceClassification(init_from=folder), SequenceClassification(pretrained=folder)):
        other.build(SyntheticData().target)
        assert {p.dtype for p in other.parameters()} == {torch.float32}


def test_language_model_folder_without_tied_keys(tiny_bert: str) -> None:
    task, reference = MaskedLM(init_from=tiny_bert), MaskedLM(tiny_bert)
    data = SyntheticData("masked_lm")
    task.build(data.target)
    reference.build(data.target)
    batch = next(iter(data.val_dataloader()))
    assert torch.equal(task.eval()(batch), reference.eval()(batch))


def test_init_from_another_architecture_than_the_tokenizers_is_refused(tiny_bert: str, tmp_path: Path) -> None:
    _, path = fitted(tiny_bert, tmp_path)
    distil = str(save_tiny_model("distilbert", tmp_path / "distil"))
    with pytest.raises(CheckpointMismatchError, match=r"it is a bert with \d+ tokens.* is a distilbert"):
        make_task(distil, init_from=path).build()


def test_checkpoint_callback_that_keeps_the_worst_model_is_refused(tiny_bert: str, tmp_path: Path) -> None:
    def fit(task: Any, kind: Any, mode: str) -> None:
        callback = ModelCheckpoint(monitor="val/score", mode=mode)
        make_trainer(tmp_path, callbacks=[callback], limit_train_batches=1).fit(task, datamodule=SyntheticData(kind))

    fit(MaskedLM(tiny_bert), "masked_lm", "min")
    fit(make_task(tiny_bert), "classification", "max")
    with pytest.raises(MonitorModeError, match="best at its minimum"):
        fit(MaskedLM(tiny_bert), "masked_lm", "max")
    with pytest.raises(MonitorModeError, match="best at its maximum"):
        fit(make_task(tiny_bert), "classification", "min")


def test_scoring_a_dense_model_under_a_strategy_is_told(
    tiny_bert: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_trainer(tmp_path).test(make_task(tiny_bert, SVD(keep_ratio=0.5)), SyntheticData(), verbose=False)
    assert "scores a dense model although the strategy is SVD" in caplog.text


def test_data_of_another_kind_is_refused(tiny_bert: str, tmp_path: Path) -> None:
    with pytest.raises(TargetKindError, match="MaskedLM handles masked_lm"):
        make_trainer(tmp_path).fit(MaskedLM(tiny_bert), datamodule=SyntheticData("classification"))


def test_nothing_to_start_from(tmp_path: Path) -> None:
    with pytest.raises(MissingArgumentError, match=r"model\.init_args\.pretrained"):
        make_trainer(tmp_path).fit(SequenceClassification(), datamodule=SyntheticData())


def test_endless_run_has_no_schedule(tiny_bert: str, tmp_path: Path) -> None:
    with pytest.raises(MissingArgumentError, match=r"trainer\.max_epochs"):
        make_trainer(tmp_path, max_epochs=-1).fit(make_task(tiny_bert), datamodule=SyntheticData())


@pytest.mark.parametrize("warmup", [-0.1, 1.0, float("nan")])
def test_warmup_outside_its_range(warmup: float) -> None:
    with pytest.raises(RangeError, match="0 <= warmup < 1"):
        SequenceClassification("x", warmup=warmup)


def test_warmup_and_decay() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = linear_warmup_decay(optimizer, 10, 0.2)
    rates = []
    for _ in range(10):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0, 0.5, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    assert schedule.get_last_lr()[0] == 0


def test_only_matrices_decay(tiny_bert: str) -> None:
    task = make_task(tiny_bert)
    task.build(SyntheticData().target)
    conform_(task.encoder, ModelLayout({"bert.encoder.layer.0.attention.self.query": {"form": "low_rank", "rank": 4}}))
    decayed, plain = decay_groups(task)
    assert plain["weight_decay"] == 0.0
    assert all(p.ndim == 1 for p in plain["params"])
    assert "weight_decay" not in decayed
    assert len(decayed["params"]) + len(plain["params"]) == len(list(task.parameters()))


def test_scheduler_of_the_users_choice(tiny_bert: str, tmp_path: Path) -> None:
    task = make_task(tiny_bert, scheduler=lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5, 99))
    trainer = make_trainer(tmp_path, limit_train_batches=2)
    trainer.fit(task, datamodule=SyntheticData())
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.005)
