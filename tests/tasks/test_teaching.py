"""Teachers that cannot teach are refused before data are prepared, or before anything is factorised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from lowrank_pl.checkpoint import build, quantize_
from lowrank_pl.contract import TargetSpec
from lowrank_pl.data import GLUE
from lowrank_pl.errors.checkpoint import NotACheckpointError
from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.errors.teacher import TeacherError
from lowrank_pl.export import save_pretrained
from lowrank_pl.strategies import SVD, RankDyna
from lowrank_pl.tasks import CausalLM, Distillation, SequenceClassification
from lowrank_pl.tasks.teacher import Teacher
from lowrank_pl.tasks.teaching import check_teacher, read_teacher
from tests.data.samples import write_sst2
from tests.support.runs import last_checkpoint, make_task, make_trainer
from tests.support.synthetic import SyntheticData
from tests.support.tiny import VOCAB, save_tiny_decoder, save_tiny_model, tiny_tokenizer

TARGET = SyntheticData().target


def fit(task: Any, folder: Path, **arguments: Any) -> str:
    trainer = make_trainer(folder, limit_train_batches=1, **arguments)
    trainer.fit(task, datamodule=SyntheticData())
    return last_checkpoint(trainer)


def read_digest(asked: Distillation) -> str:
    saved = read_teacher(asked)
    return Teacher(build(saved, AutoModelForSequenceClassification)).digest


@pytest.fixture(scope="module")
def dense(tiny_bert: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return fit(make_task(tiny_bert), tmp_path_factory.mktemp("dense"))


@pytest.fixture
def _unread(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(self: Any) -> None:
        raise AssertionError("the data were asked for")

    monkeypatch.setattr(GLUE, "prepare_data", prepare)


@pytest.mark.usefixtures("_unread")
def test_before_any_data(tiny_bert: str, dense: str, tmp_path: Path) -> None:
    data = GLUE(tiny_bert, "SST-2", str(write_sst2(tmp_path / "sst2")), max_length=32)
    small = fit(make_task(None, SVD(keep_ratio=0.5), init_from=dense), tmp_path)
    refused: list[tuple[Any, type[Exception], str]] = [
        (
            make_task(tiny_bert, RankDyna(keep_ratio=0.5), distillation=Distillation()),
            TeacherError,
            "is freshly",
        ),
        (make_task(None, init_from=small, distillation=Distillation()), TeacherError, "is factorised already"),
        (make_task(tiny_bert, distillation=Distillation("nowhere.ckpt")), NotACheckpointError, "distillation.teacher"),
        (make_task(tiny_bert, distillation=Distillation(dense)), TeacherError, r"\['no', 'yes'\], the data ask for"),
        (make_task(tiny_bert, distillation=Distillation(tiny_bert)), TeacherError, "it is a BertForMaskedLM"),
    ]
    for task, error, told in refused:
        with pytest.raises(error, match=told):
            make_trainer(tmp_path).fit(task, datamodule=data)
        assert not task.is_built


def test_a_random_head_is_found_when_it_is_built(tiny_bert: str, tmp_path: Path) -> None:
    """A folder that does not tell its head, and a checkpoint that is resumed without what its run started from."""
    folder = save_tiny_model("bert", tmp_path / "untold")
    fields = json.loads((folder / "config.json").read_text())
    del fields["architectures"]
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(TeacherError, match="nothing to learn from it"):
        fit(make_task(str(folder), SVD(keep_ratio=0.5), distillation=Distillation()), tmp_path)


@pytest.mark.parametrize(
    ("target", "told"),
    [
        (TargetSpec("x", "regression", (), ("pearson",)), r"classification with labels .*the data ask for regression"),
        (TargetSpec("x", "classification", ("yes", "no")), r"\['no', 'yes'\], the data ask for .*\['yes', 'no'\]"),
        (TargetSpec("x", "classification", ("no", "yes", "maybe")), "ask for classification with labels"),
        (TargetSpec("x", "token_classification", ("no", "yes")), "ask for token_classification"),
    ],
)
def test_other_labels(tiny_bert: str, dense: str, target: TargetSpec, told: str) -> None:
    saved = read_teacher(Distillation(dense))
    with pytest.raises(TeacherError, match=told):
        check_teacher(Distillation(dense), saved, target, saved.config, tiny_bert)


def test_other_shapes_count_for_hidden_states_alone(tiny_bert: str, tmp_path: Path) -> None:
    deep = fit(make_task(str(save_tiny_model("bert", tmp_path / "deep", layers=3))), tmp_path)
    with pytest.raises(
        TeacherError, match=r"it has 3 blocks of 32 features, the model that learns 2 .*hidden_states: 0"
    ):
        fit(make_task(tiny_bert, distillation=Distillation(deep)), tmp_path)
    fit(make_task(tiny_bert, distillation=Distillation(deep, hidden_states=0)), tmp_path)


def test_a_teacher_that_cannot_read_the_longest_samples(tiny_bert: str, dense: str, tmp_path: Path) -> None:
    data: Any = SyntheticData()
    data.max_length = 129
    with pytest.raises(TeacherError, match="reads 128 tokens, the samples have up to 129"):
        make_trainer(tmp_path).fit(make_task(tiny_bert, distillation=Distillation(dense)), datamodule=data)


def test_another_tokenizer(tiny_bert: str, dense: str, tmp_path: Path) -> None:
    """Of the same size, with two tokens exchanged; one that is not there any more is told by its size alone."""
    folder = save_tiny_model("bert", tmp_path / "other")
    tokenizer = folder / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    content["model"]["vocab"]["good"], content["model"]["vocab"]["bad"] = VOCAB["bad"], VOCAB["good"]
    tokenizer.write_text(json.dumps(content))
    asked = Distillation(dense)
    with pytest.raises(TeacherError, match=f"{len(VOCAB)} tokens.* they differ in '(good|bad)'"):
        fit(make_task(str(folder), distillation=asked), tmp_path)
    saved = read_teacher(asked)
    student = type(saved.config)(**{**saved.config.to_dict(), "vocab_size": 7})
    with pytest.raises(TeacherError, match="tokens and the model that learns 7"):
        check_teacher(asked, saved, TARGET, student, "gone")


def test_a_teacher_that_is_not_told_which_text_of_a_pair_is_which(
    tiny_bert: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """As BERT is not where a DistilBERT, whose tokenizer has no token types, learns from it."""
    folder = save_tiny_model("bert", tmp_path / "typed")
    tokenizer = tiny_tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    typed = fit(make_task(str(folder)), tmp_path)
    for student, told in ((str(folder), False), (tiny_bert, True)):
        recwarn.clear()
        task = make_task(student, distillation=Distillation(typed))
        task.build(TARGET)
        task.take_teacher()
        assert any("reads pairs as one text" in str(warning.message) for warning in recwarn) == told


def test_every_place_that_holds_a_model(tiny_bert: str, dense: str, tmp_path: Path) -> None:
    """The output of `compress`, an exported folder, a family with other inputs."""
    trainer = make_trainer(tmp_path)
    trainer.compress(make_task(None, SVD(keep_ratio=0.5), init_from=dense), SyntheticData(), str(tmp_path / "small"))
    dense_task = SequenceClassification.load_from_checkpoint(dense)
    dense_task.encoder.save_pretrained(tmp_path / "folder")
    distil = fit(make_task(str(save_tiny_model("distilbert", tmp_path / "distil"))), tmp_path)
    batch = next(iter(SyntheticData().val_dataloader()))
    batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])  # which the last one does not take
    for teacher in (str(tmp_path / "small"), str(tmp_path / "folder"), distil):
        task = make_task(None, init_from=dense, distillation=Distillation(teacher, hidden_states=0))
        task.build(TARGET)
        task.take_teacher()
        logits, states = task._teacher(batch, False)
        assert logits.shape == (8, 2)
        assert not states
        assert not logits.requires_grad


def test_a_folder_in_eight_bits_teaches_and_is_known_again(dense: str, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    model = SequenceClassification.load_from_checkpoint(dense).encoder.eval()
    quantize_(model, "int8_dynamic")
    asked = Distillation(str(save_pretrained(model, str(tmp_path / "int8"))))
    path = fit(make_task(None, init_from=dense, distillation=asked), tmp_path)
    one, other = (read_digest(teacher) for teacher in (asked, Distillation(dense)))
    assert torch.load(path)["lowrank_distillation"]["teacher"] == one != other


def test_a_folder_of_a_decoder_teaches_a_decoder(tmp_path: Path) -> None:
    """Its configuration has transformers' two nameless labels, which mean nothing for tokens."""
    folder = str(save_tiny_decoder("llama", tmp_path / "llama"))
    data = SyntheticData("causal_lm", size=8)
    task = CausalLM(folder, strategy=SVD(keep_ratio=0.5), distillation=Distillation(folder))
    trainer = make_trainer(tmp_path, limit_train_batches=1, limit_val_batches=0)
    trainer.fit(task, datamodule=data)
    assert float(trainer.callback_metrics["train/distillation"]) > 0
    asked = Distillation(folder, hidden_states=0, cache=True)
    with pytest.raises(RangeError, match="false for language modelling"):
        make_trainer(tmp_path).fit(CausalLM(folder, distillation=asked), datamodule=data)
