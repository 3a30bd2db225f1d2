"""Labels shifted once, losses and perplexity against transformers' own and against sums by hand."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BartConfig

from lowrank_pl.contract import TargetSpec
from lowrank_pl.data import CausalText
from lowrank_pl.errors.checkpoint import CheckpointMismatchError
from lowrank_pl.errors.data import MaxLengthError
from lowrank_pl.errors.numerics import NonFiniteScoreError
from lowrank_pl.errors.pretrained import FactorisedFolderError, NotADecoderError, UnsupportedModelError
from lowrank_pl.errors.run import MonitorModeError, TargetKindError
from lowrank_pl.export import export
from lowrank_pl.hub import check_supported
from lowrank_pl.strategies import SVD
from lowrank_pl.tasks import CausalLM, MaskedLM
from lowrank_pl.tasks.causal_lm import LongestWindow, next_tokens
from lowrank_pl.tasks.metrics import Perplexity
from tests.support.runs import last_checkpoint, make_trainer
from tests.support.synthetic import SyntheticData
from tests.support.tiny import VOCAB, save_tiny_decoder

TARGET = TargetSpec("text", "causal_lm", (), ("perplexity",))
WORDS = ["the", "of", "and", "to", "is", "that", "it", "was", "good", "bad", "film", "great", "awful", "plot"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_decoder("llama", tmp_path_factory.mktemp("llama") / "model"))


def text(folder: Path, words: int, seed: int = 0) -> str:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(WORDS), (words,), generator=generator).tolist()
    path = folder / f"{words}-{seed}.txt"
    path.write_text(" ".join(WORDS[at] for at in chosen))
    return str(path)


def corpus(folder: Path, tokenizer: str, **arguments: Any) -> CausalText:
    files = {"train": text(folder, 90), "validation": text(folder, 53, 1), "test": text(folder, 53, 1)}
    return CausalText(tokenizer, **{**files, "window": 16, "batch_size": 2, "eval_batch_size": 3, **arguments})


def built(pretrained: str) -> CausalLM:
    task = CausalLM(pretrained)
    task.build(TARGET)
    task.eval()
    return task


def batch_of(lengths: tuple[int, ...] = (9, 4, 7)) -> dict[str, Tensor]:
    ids = torch.randint(5, len(VOCAB), (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask.bool(), ids, -100)}


def test_the_loss_is_the_one_of_transformers(llama: str) -> None:
    """Which shifts labels itself: shifted not at all, or twice, they would give another."""
    task, batch = built(llama), batch_of()
    theirs = task.encoder(**batch).loss
    torch.testing.assert_close(task.training_loss(task(batch), batch["labels"]), theirs)
    for row, length in enumerate((9, 4, 7)):
        ids = batch["input_ids"][row : row + 1, :length]
        alone = task.encoder(input_ids=ids, labels=ids).loss
        torch.testing.assert_close(task.per_sample_losses(batch)[row], alone)


def test_positions_stay_exact_in_a_trainer_of_half_precision(llama: str, tmp_path: Path) -> None:
    """Rotary frequencies rounded to bfloat16 would turn distant tokens by radians, and no file holds them."""
    task = CausalLM(llama)
    make_trainer(tmp_path, precision="bf16-true").fit(task, datamodule=SyntheticData("causal_lm", size=8))
    frequencies = {n: b for n, b in task.encoder.named_buffers() if n.endswith("inv_freq")}
    assert task.encoder.dtype == torch.bfloat16
    assert frequencies
    exact = dict(built(llama).encoder.named_buffers())
    assert all(torch.equal(found, exact[name]) for name, found in frequencies.items())


def test_what_is_predicted_stands_where_it_is_predicted_for(llama: str) -> None:
    task, batch = built(llama), batch_of()
    logits = task(batch)
    found = task.predictions(logits)
    assert torch.equal(found[:, 1:], logits[:, :-1].argmax(-1))
    assert bool((found[:, 0] == -100).all())
    sure = torch.full_like(logits, -1e4).scatter_(-1, batch["input_ids"].roll(-1, 1)[..., None], 0.0)
    drawn = task.drawn_labels(sure, batch, lambda count: torch.rand(count, dtype=torch.float64))
    expected = batch["labels"].clone()
    expected[:, 0] = -100
    assert torch.equal(drawn, expected)
    without = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(task.drawn_labels(sure, without, lambda count: torch.rand(count).double()), expected)


def test_perplexity_is_exact_over_unequal_windows_and_parts() -> None:
    """Two processes that have unequal shares, one of them a token that float32 holds to be impossible."""
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(b, t, 50, generator=generator) for b, t in ((3, 16), (1, 5), (2, 16))]
    logits[1][0, 2] = torch.full((50,), -300.0).index_fill_(0, torch.tensor(7), 0.0)
    labels = [torch.randint(0, 6, part.shape[:2], generator=generator) for part in logits]
    labels[0][0, :9] = -100
    total, count = 0.0, 0
    for part, wanted in zip(logits, labels, strict=True):
        each = -part.double().log_softmax(-1).gather(-1, wanted.clamp(min=0)[..., None])[..., 0]
        total += float(each[wanted != -100].sum())
        count += int((wanted != -100).sum())
    shares = [Perplexity(), Perplexity()]
    for index, pair in enumerate(zip(logits, labels, strict=True)):
        shares[index % 2].update(*pair)
    shares[0].merge_state(shares[1])
    assert float(shares[0].compute()) == pytest.approx(float(torch.tensor(total / count).double().exp()), rel=1e-6)


@pytest.mark.parametrize("stride", [None, 5])
def test_test_reports_loss_perplexity_tokens_and_window(stride: int | None, llama: str, tmp_path: Path) -> None:
    task, data = CausalLM(llama), corpus(tmp_path, llama, stride=stride)
    (found,) = make_trainer(tmp_path).test(task, data, verbose=False)
    ids = torch.tensor(
        data.load_tokenizer()(Path(str(data.files["test"])).read_text(), add_special_tokens=False).input_ids
    )
    starts = range(0, 53, 16) if stride is None else range(0, 53 - 16 + 5, 5)
    total, count, done = 0.0, 0, 0
    for start in starts:
        window = ids[start : start + 16]
        with torch.no_grad():
            logits = task.encoder.eval()(input_ids=window[None]).logits[0]
        each = F.cross_entropy(logits[:-1].double(), window[1:], reduction="none")
        new = each[max(done - start - 1, 0) :]
        total, count, done = total + float(new.sum()), count + len(new), start + 16
    assert (found["test/tokens"], found["test/window"]) == (count, 16) == ({None: 49, 5: 52}[stride], 16)
    assert found["test/loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["test/perplexity"] == pytest.approx(float(torch.tensor(total / count).exp()), rel=1e-5)
    assert found["test/score"] == pytest.approx(found["test/perplexity"])
    assert data.describe()["predicted_tokens"]["test"] == count


def test_lower_is_better(llama: str, tmp_path: Path) -> None:
    data = corpus(tmp_path, llama)
    worst = pl.callbacks.ModelCheckpoint(monitor="val/score", mode="max")
    with pytest.raises(MonitorModeError, match="'min'"):
        make_trainer(tmp_path, callbacks=[worst]).fit(CausalLM(llama), data)
    best = pl.callbacks.ModelCheckpoint(monitor="val/score_at_budget", mode="min")
    trainer = make_trainer(tmp_path, callbacks=[best], max_epochs=2)
    pl.seed_everything(0, verbose=False)
    trainer.fit(CausalLM(llama, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2)), data)
    assert float(best.best_model_score) == min(float(s) for s in best.best_k_models.values())  # type: ignore[arg-type]
    assert 1 < float(trainer.callback_metrics["val/score"]) < len(VOCAB)


def test_wrong_models_and_data_are_refused(llama: str, tiny_bert: str, tmp_path: Path) -> None:
    with pytest.raises(NotADecoderError, match="'bert', an encoder: each of its tokens sees those that follow"):
        make_trainer(tmp_path).fit(CausalLM(tiny_bert), corpus(tmp_path, tiny_bert))
    both = BartConfig(d_model=8, vocab_size=len(VOCAB), encoder_layers=1, decoder_layers=1)
    with pytest.raises(UnsupportedModelError, match="'bart', which has an encoder beside its decoder"):
        check_supported(AutoModelForCausalLM, "facebook/bart-base", both)
    with pytest.raises(UnsupportedModelError, match="has no AutoModelForMaskedLM"):
        make_trainer(tmp_path).fit(MaskedLM(llama), SyntheticData("masked_lm"))
    with pytest.raises(TargetKindError, match="CausalLM handles causal_lm"):
        make_trainer(tmp_path).fit(CausalLM(llama), SyntheticData("masked_lm"))
    trainer = make_trainer(tmp_path)
    trainer.fit(MaskedLM(tiny_bert), SyntheticData("masked_lm", size=8))
    with pytest.raises(CheckpointMismatchError, match="it was trained for masked_lm, the data 'CausalText'"):
        make_trainer(tmp_path).fit(CausalLM(init_from=last_checkpoint(trainer)), corpus(tmp_path, tiny_bert))


@pytest.mark.parametrize("verb", ["compress", "validate", "test", "predict", "fit"])
def test_a_model_whose_loss_is_not_finite_is_refused_with_the_module(verb: str, llama: str, tmp_path: Path) -> None:
    strategy = SVD(keep_ratio=0.5) if verb == "compress" else None
    task, data = CausalLM(llama, strategy=strategy), corpus(tmp_path, llama)
    task.build(TARGET)
    norm: Any = task.encoder.get_submodule("model.layers.1.post_attention_layernorm")
    norm.weight.data[3] = torch.nan
    options = {"output": str(tmp_path / "out")} if verb == "compress" else {}
    trainer = make_trainer(tmp_path, num_sanity_val_steps=2)
    module = r"module 'model\.layers\.1\.post_attention_layernorm', whose weight is not finite"
    what = "what the model predicts" if verb == "predict" else "batch"
    with pytest.raises(NonFiniteScoreError, match=f"{what} is NaN or Inf, first seen in the output of {module}"):
        getattr(trainer, verb)(task, datamodule=data, **options)
    assert not (tmp_path / "out").exists()
    assert not any(module._forward_hooks for module in task.encoder.modules())


@pytest.mark.parametrize("verb", ["fit", "test"])
def test_windows_beyond_the_positions_of_a_checkpoint_are_refused(verb: str, tmp_path: Path) -> None:
    """The tokenizer's folder may be another model's, with more of them."""
    short = str(save_tiny_decoder("gpt2", tmp_path / "short"))
    trainer = make_trainer(tmp_path, limit_train_batches=1, limit_val_batches=1)
    trainer.fit(CausalLM(short), corpus(tmp_path, short))
    config = AutoConfig.from_pretrained(short)
    longer = tmp_path / "longer"
    shutil.copytree(short, longer)
    config.n_positions = 2 * config.n_positions
    config.save_pretrained(longer)
    data = corpus(tmp_path, str(longer), window=config.n_positions)
    with pytest.raises(MaxLengthError, match=rf"window={config.n_positions}.* 8 to {config.n_positions // 2}"):
        getattr(make_trainer(tmp_path), verb)(CausalLM(init_from=last_checkpoint(trainer)), datamodule=data)


def test_a_rotary_model_from_elsewhere_takes_what_the_tokenizers_folder_allows(llama: str, tmp_path: Path) -> None:
    """Its positions are computed, and those that a raised limit allows are no mistake."""
    trainer = make_trainer(tmp_path, limit_train_batches=1, limit_val_batches=1)
    trainer.fit(CausalLM(llama), corpus(tmp_path, llama))
    config = AutoConfig.from_pretrained(llama)
    shutil.copytree(llama, tmp_path / "longer")
    window = config.max_position_embeddings + 8
    config.max_position_embeddings = window
    config.save_pretrained(tmp_path / "longer")
    tokenizer = AutoTokenizer.from_pretrained(llama, model_max_length=window)
    tokenizer.save_pretrained(tmp_path / "longer")
    data = CausalText(str(tmp_path / "longer"), test=text(tmp_path, 3 * window, 2), window=window)
    (scores,) = make_trainer(tmp_path).test(CausalLM(init_from=last_checkpoint(trainer)), datamodule=data)
    assert scores["test/window"] == window


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_inspect_refuses_windows_beyond_the_positions(family: str, tmp_path: Path) -> None:
    short = str(save_tiny_decoder(family, tmp_path / "short"))
    with pytest.raises(MaxLengthError, match="window=4096"):
        make_trainer(tmp_path).inspect(CausalLM(short), CausalText(short, train="none.txt", window=4096))


def test_a_factorised_folder_is_no_dense_model(llama: str, tmp_path: Path) -> None:
    task, data = CausalLM(llama, strategy=SVD(keep_ratio=0.5)), corpus(tmp_path, llama)
    make_trainer(tmp_path).compress(task, data, output=str(tmp_path / "small"))
    export(str(tmp_path / "small"), str(tmp_path / "folder"))
    with pytest.raises(FactorisedFolderError, match=r"factorised layers; .*Give it as model.init_args.init_from"):
        make_trainer(tmp_path).test(CausalLM(str(tmp_path / "folder")), datamodule=data)
    with pytest.raises(FactorisedFolderError):
        make_trainer(tmp_path).inspect(CausalLM(str(tmp_path / "folder")))


def test_a_run_that_has_trained_keeps_what_it_has_although_its_loss_is_not_finite(llama: str, tmp_path: Path) -> None:
    trainer, task = make_trainer(tmp_path, num_sanity_val_steps=2, limit_train_batches=1), CausalLM(llama)
    spoil = LambdaCallback(on_train_batch_end=lambda *_: task.encoder.lm_head.weight.data.fill_(torch.nan))
    trainer.callbacks.append(spoil)
    trainer.fit(task, datamodule=corpus(tmp_path, llama))
    assert trainer.callback_metrics["val/loss"].isnan()
    assert Path(last_checkpoint(trainer)).exists()


def test_the_longest_window_is_told_without_padding() -> None:
    metric = LongestWindow()
    labels = torch.tensor([[-100, 5, 6, 7, -100, -100, -100, -100], [-100, -100, -100, -100, 8, -100, -100, -100]])
    metric.update(torch.zeros(2, 8, 9), next_tokens(labels))
    assert metric.compute() == 5
    metric.update(torch.zeros(1, 3, 9), next_tokens(torch.tensor([[-100, 5, 6]])))
    assert metric.compute() == 5


def test_a_student_imitates_only_where_tokens_are_predicted() -> None:
    """Labels of the last two tokens: predicted by the logits of the second and third place, of four."""
    generator = torch.Generator().manual_seed(0)
    logits, taught = torch.randn(2, 1, 4, 5, generator=generator)
    labels = torch.tensor([[-100, -100, 1, 2]])
    task = CausalLM()
    expected = F.kl_div(
        logits[0, 1:3].log_softmax(-1), taught[0, 1:3].log_softmax(-1), log_target=True, reduction="sum"
    )
    torch.testing.assert_close(task.imitation_loss(logits, taught, labels, 1.0), expected / 2)
