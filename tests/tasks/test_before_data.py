"""What needs no data to be seen is refused before any are prepared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lowrank_pl.data import GLUE, CausalText, CoNLL, TextCorpus, TextFiles
from lowrank_pl.errors import LowRankError
from lowrank_pl.errors.checkpoint import CheckpointMismatchError, NotACheckpointError
from lowrank_pl.errors.numerics import BudgetError
from lowrank_pl.errors.pretrained import ModelFolderError, NotADecoderError, VocabularySizeError
from lowrank_pl.errors.run import MonitorModeError, NothingToCompressError, TargetKindError
from lowrank_pl.errors.targets import AlreadyFactorisedError, NoTargetError
from lowrank_pl.strategies import FWSVD, SVD, RankDyna
from lowrank_pl.surgery import TargetSelector
from lowrank_pl.tasks import CausalLM, MaskedLM, SequenceClassification, TokenClassification
from tests.data.samples import write_sst2
from tests.support.runs import last_checkpoint, make_task, make_trainer
from tests.support.synthetic import SyntheticData
from tests.support.tiny import save_tiny_model


class ReadError(AssertionError):
    """The data were asked for."""


@pytest.fixture
def _unread(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(self: Any) -> None:
        raise ReadError

    for cls in (GLUE, TextFiles, CoNLL, TextCorpus, CausalText):
        monkeypatch.setattr(cls, "prepare_data", prepare)


def sst2(tokenizer: str, folder: Path) -> GLUE:
    return GLUE(tokenizer, "SST-2", str(write_sst2(folder / "sst2")), max_length=32, batch_size=4)


@pytest.mark.usefixtures("_unread")
@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_data_of_another_kind(tiny_bert: str, tmp_path: Path, verb: str) -> None:
    trainers: list[pl.Trainer] = [make_trainer(tmp_path), pl.Trainer(accelerator="cpu", logger=False)]
    for trainer in trainers:
        run = getattr(trainer, verb)
        with pytest.raises(TargetKindError, match="'SST-2' is a classification data set, and TokenClassification"):
            run(TokenClassification(tiny_bert), datamodule=sst2(tiny_bert, tmp_path))
        with pytest.raises(TargetKindError, match="'CoNLL' is a token_classification data set"):
            run(MaskedLM(tiny_bert), datamodule=CoNLL(tiny_bert, "a.txt", "b.txt"))
        with pytest.raises(TargetKindError, match="'TextCorpus' is a masked_lm data set"):
            run(make_task(tiny_bert), datamodule=TextCorpus(tiny_bert, "a.txt", "b.txt"))
        with pytest.raises(ReadError):
            run(make_task(tiny_bert), datamodule=TextFiles(tiny_bert, "a.csv"))


@pytest.mark.usefixtures("_unread")
@pytest.mark.parametrize(
    ("strategy", "error"),
    [
        (SVD(keep_ratio=0.01), BudgetError),
        (FWSVD("both", keep_ratio=0.01), BudgetError),
        (RankDyna(keep_ratio=0.01), BudgetError),
        (RankDyna(model_parameters=100), BudgetError),
        (SVD(keep_ratio=0.5, targets=TargetSelector(["nothing*"])), NoTargetError),
    ],
)
def test_a_plan_that_is_not_possible(tiny_bert: str, tmp_path: Path, strategy: Any, error: type[LowRankError]) -> None:
    for data in (sst2(tiny_bert, tmp_path), TextFiles(tiny_bert, "a.csv")):
        with pytest.raises(error):
            make_trainer(tmp_path).fit(make_task(tiny_bert, strategy), datamodule=data)


@pytest.mark.usefixtures("_unread")
def test_what_is_possible_goes_on_to_the_data(tiny_bert: str, tmp_path: Path) -> None:
    for strategy in (SVD(keep_ratio=0.5), RankDyna(keep_ratio=0.33), RankDyna(model_parameters=20_000), None):
        task = make_task(tiny_bert, strategy)
        with pytest.raises(ReadError):
            make_trainer(tmp_path).fit(task, datamodule=TextFiles(tiny_bert, "a.csv"))
        assert not task.is_built
    task = make_task(tiny_bert, LooksAtValues(keep_ratio=0.5))
    with pytest.raises(ReadError):
        make_trainer(tmp_path).fit(task, datamodule=TextFiles(tiny_bert, "a.csv"))


class LooksAtValues(SVD):
    """A strategy of somebody else, whose plan needs more than shapes."""

    def plan(self, encoder: Any) -> Any:
        next(encoder.parameters()).sum().item()
        return super().plan(encoder)


@pytest.mark.usefixtures("_unread")
def test_compress_and_diagnose_look_first(tiny_bert: str, tmp_path: Path) -> None:
    data, out = sst2(tiny_bert, tmp_path), str(tmp_path / "out")
    trainer = make_trainer(tmp_path)
    with pytest.raises(BudgetError):
        trainer.compress(make_task(tiny_bert, SVD(keep_ratio=0.01)), data, out)
    with pytest.raises(NothingToCompressError, match="RankDyna"):
        trainer.compress(make_task(tiny_bert, RankDyna(keep_ratio=0.5)), data, out)
    with pytest.raises(BudgetError):
        trainer.diagnose(make_task(tiny_bert), data, out, keep_ratio=0.01)
    with pytest.raises(ReadError):
        trainer.diagnose(make_task(tiny_bert), data, out)


@pytest.mark.usefixtures("_unread")
def test_a_model_that_is_factorised_in_part_is_refused(tiny_bert: str, tmp_path: Path) -> None:
    """The budget would be a share of the rest, and the report would tell of the rest alone."""
    half, rest = TargetSelector(exclude=["*.output.dense"]), TargetSelector(["*.layer.*.output.dense"])
    source, data = str(tmp_path / "half"), TextFiles(tiny_bert, "a.csv")
    make_trainer(tmp_path).compress(make_task(tiny_bert, SVD(keep_ratio=0.5, targets=half)), SyntheticData(), source)
    told = r"8 of the 12 layers .* factorised already \(by SVD, keep_ratio 0\.4.* 'bert\..*name what is left.*include"
    for strategy in (SVD(keep_ratio=0.3), RankDyna(keep_ratio=0.3)):
        with pytest.raises(AlreadyFactorisedError, match=told):
            make_trainer(tmp_path).fit(make_task(None, strategy, init_from=source), datamodule=data)
    again = make_task(None, SVD(keep_ratio=0.3), init_from=source)
    with pytest.raises(AlreadyFactorisedError, match=told):
        make_trainer(tmp_path).compress(again, data, str(tmp_path / "out"))
    # What names no factorised layer is allowed, and so is training.
    for allowed in (SVD(keep_ratio=0.3, targets=rest), RankDyna(keep_ratio=0.3, targets=rest), None):
        with pytest.raises(ReadError):
            make_trainer(tmp_path).fit(make_task(None, allowed, init_from=source), datamodule=data)


@pytest.mark.usefixtures("_unread")
def test_weights_and_monitors(tiny_bert: str, tmp_path: Path) -> None:
    data = TextCorpus(tiny_bert, "a.txt", "b.txt")
    worst = ModelCheckpoint(monitor="val/score", mode="max")
    with pytest.raises(MonitorModeError):
        make_trainer(tmp_path, callbacks=[worst]).fit(MaskedLM(tiny_bert), datamodule=data)
    with pytest.raises(NotACheckpointError, match="nowhere"):
        make_trainer(tmp_path).fit(MaskedLM(init_from=str(tmp_path / "nowhere")), datamodule=data)
    (tmp_path / "table.csv").write_text("sentence,label\n")
    onnx = save_tiny_model("bert", tmp_path / "onnx")
    (onnx / "model.onnx").touch()
    for verb in ("validate", "test", "predict"):
        for name, told in (("nowhere", "no such"), ("table.csv", "not a readable"), ("onnx", "onnxruntime alone")):
            with pytest.raises(NotACheckpointError, match=told):
                getattr(make_trainer(tmp_path), verb)(MaskedLM(init_from=str(tmp_path / name)), datamodule=data)
    broken = save_tiny_model("bert", tmp_path / "broken")
    (broken / "model.safetensors").unlink()
    with pytest.raises(ModelFolderError, match="no weights"):
        make_trainer(tmp_path).fit(MaskedLM(str(broken)), datamodule=data)


@pytest.mark.usefixtures("_unread")
def test_an_encoder_is_no_decoder_in_any_verb(tiny_bert: str, tmp_path: Path) -> None:
    data = CausalText(tiny_bert, "a.txt", "b.txt")
    for verb in ("fit", "validate", "test"):
        with pytest.raises(NotADecoderError):
            getattr(make_trainer(tmp_path), verb)(CausalLM(tiny_bert), datamodule=data)


@pytest.mark.usefixtures("_unread")
def test_tokens_without_an_embedding(tiny_bert: str, tmp_path: Path) -> None:
    """Of the model that a run starts from, whatever it is read from."""
    folder = save_tiny_model("bert", tmp_path / "bert")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 50}))
    with pytest.raises(VocabularySizeError, match=r"has \d+ tokens, and '.*/bert' embeddings for 50"):
        make_trainer(tmp_path).test(MaskedLM(str(folder)), datamodule=TextCorpus(str(folder), "a.txt", "b.txt"))
    task = make_task(None, init_from=str(folder))
    with pytest.raises(VocabularySizeError):
        make_trainer(tmp_path).validate(task, datamodule=sst2(tiny_bert, tmp_path))
    saved = {"lowrank_task": {"config": json.dumps({**config, "vocab_size": 50})}}
    torch.save(saved, tmp_path / "x.ckpt")
    with pytest.raises(VocabularySizeError, match=r"x\.ckpt"):
        make_trainer(tmp_path).test(make_task(None), sst2(tiny_bert, tmp_path), ckpt_path=str(tmp_path / "x.ckpt"))


def test_weights_that_predict_something_else(tiny_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path)
    trainer.fit(make_task(tiny_bert), datamodule=sst2(tiny_bert, tmp_path))
    path = last_checkpoint(trainer)

    def prepare(self: Any) -> None:
        raise ReadError

    monkeypatch.setattr(GLUE, "prepare_data", prepare)
    with pytest.raises(CheckpointMismatchError, match="it predicts 2 labels of 'SST-2'"):
        make_trainer(tmp_path).fit(make_task(None, init_from=path), datamodule=GLUE(tiny_bert, "MNLI", "nowhere"))
    task = make_task(None, SVD(keep_ratio=0.01), init_from=path)
    with pytest.raises(BudgetError):
        make_trainer(tmp_path).fit(task, datamodule=sst2(tiny_bert, tmp_path))


def test_a_model_tells_texts_alone_what_they_are_asked_for(tiny_bert: str, tmp_path: Path) -> None:
    """From a checkpoint, from `init_from`, and from a model that is there already; with a plain trainer too."""
    trainer = make_trainer(tmp_path)
    trainer.fit(make_task(tiny_bert), datamodule=sst2(tiny_bert, tmp_path))
    path = last_checkpoint(trainer)
    (tmp_path / "new.txt").write_text("a good film\nthe bad plot\nit was awful\n", encoding="utf-8")

    def data() -> TextFiles:
        return TextFiles(tiny_bert, predict=str(tmp_path / "new.txt"), max_length=32, eval_batch_size=2)

    runs: list[Any] = [
        make_trainer(tmp_path).predict(make_task(tiny_bert), data(), ckpt_path=path),
        make_trainer(tmp_path).predict(make_task(None, init_from=path), data()),
        pl.Trainer(accelerator="cpu", logger=False).predict(SequenceClassification.load_from_checkpoint(path), data()),
    ]
    logits = [[row for batch in run for row in batch["logits"].tolist()] for run in runs]
    assert len(logits[0]) == 3
    assert logits[0] == logits[1] == logits[2]
