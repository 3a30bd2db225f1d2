from __future__ import annotations

import logging
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lowrank_pl.contract import CalibrationSource, DescribesData, HasTarget, choose
from lowrank_pl.data import GLUE, TextDataModule
from lowrank_pl.errors.data import (
    ArgumentRangeError,
    DataNotReadyError,
    MaxLengthError,
    MissingTokenError,
    TooFewSamplesError,
)
from tests.data.samples import write_sst2, write_tsv
from tests.support.tiny import save_tiny_model, tiny_tokenizer

rank_zero_log = logging.getLogger("lightning.pytorch.utilities.rank_zero")


def ready(tokenizer: str, folder: Path, **arguments: Any) -> GLUE:
    module = GLUE(tokenizer, "SST-2", str(folder), **{"max_length": 64, "batch_size": 4, **arguments})
    module.prepare_data()
    module.setup()
    return module


@pytest.fixture
def sst2(tiny_bert: str, tmp_path: Path) -> GLUE:
    return ready(tiny_bert, write_sst2(tmp_path / "sst2"))


def rows(batches: Any) -> list[tuple[int, ...]]:
    """Samples of batches without their padding, in order."""
    found = []
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            found.append(tuple(ids[mask.bool()].tolist()))
    return found


def same(left: list[dict[str, Tensor]], right: list[dict[str, Tensor]]) -> bool:
    return len(left) == len(right) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(left, right, strict=True)
    )


def test_fulfils_the_contract(sst2: GLUE) -> None:
    assert isinstance(sst2, HasTarget)
    assert isinstance(sst2, CalibrationSource)
    assert isinstance(sst2, DescribesData)


def test_tells_reports_what_it_holds(sst2: GLUE) -> None:
    told = sst2.describe()
    assert told["fingerprint"] == sst2.fingerprint
    assert told["samples"]["train"] == len(sst2.split("train"))
    assert told["samples"]["validation"] == len(sst2.split("validation"))


# Batches.


def test_a_batch_has_inputs_and_labels_padded_to_its_longest(sst2: GLUE) -> None:
    for batch in sst2.train_dataloader():
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        assert batch["labels"].dtype == torch.long
        assert batch["labels"].shape == (len(batch["input_ids"]),)
        assert batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1]
        assert (batch["input_ids"][batch["attention_mask"] == 0] == 0).all()


def test_padding_to_a_multiple(tiny_bert: str, tmp_path: Path) -> None:
    module = ready(tiny_bert, write_sst2(tmp_path / "sst2"), pad_to_multiple_of=8)
    assert all(batch["input_ids"].shape[1] % 8 == 0 for batch in module.train_dataloader())


def test_loaders_cover_their_split(sst2: GLUE) -> None:
    for loader, name in [
        (sst2.train_dataloader(), "train"),
        (sst2.val_dataloader(), "validation"),
        (sst2.predict_dataloader(), "test"),
    ]:
        expected = [tuple(ids) for ids in sst2.split(name)["input_ids"]]
        assert sorted(rows(loader)) == sorted(expected)
    assert rows(sst2.predict_dataloader()) == [tuple(ids) for ids in sst2.split("test")["input_ids"]]


def test_labels_stay_with_their_texts(sst2: GLUE) -> None:
    split = sst2.split("train")
    truth = {tuple(ids): label for ids, label in zip(split["input_ids"], split["labels"], strict=True)}
    batches = list(sst2.train_dataloader())
    labels = torch.cat([batch["labels"] for batch in batches]).tolist()
    assert [truth[row] for row in rows(batches)] == labels


def test_testing_falls_back_to_validation_without_labels(sst2: GLUE) -> None:
    assert not sst2.has_labelled_test
    assert sorted(rows(sst2.test_dataloader())) == sorted(rows(sst2.val_dataloader()))
    assert all("labels" not in batch for batch in sst2.predict_dataloader())


def test_validation_is_the_same_in_every_epoch(sst2: GLUE) -> None:
    assert same(list(sst2.val_dataloader()), list(sst2.val_dataloader()))


def in_process(module: GLUE, rank: int, world_size: int) -> GLUE:
    """The datamodule as Lightning hands it to one of several processes."""
    kwargs = {"num_replicas": world_size, "rank": rank}
    state = SimpleNamespace(fn=TrainerFn.VALIDATING)
    module.trainer = SimpleNamespace(state=state, distributed_sampler_kwargs=kwargs)  # type: ignore[assignment]
    return module


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_evaluate_every_sample_once(sst2: GLUE, world_size: int) -> None:
    for make, name in [
        (GLUE.val_dataloader, "validation"),
        (GLUE.test_dataloader, "validation"),
        (GLUE.predict_dataloader, "test"),
    ]:
        shares = [rows(make(in_process(sst2, rank, world_size))) for rank in range(world_size)]
        assert sorted(row for share in shares for row in share) == sorted(map(tuple, sst2.split(name)["input_ids"]))


def test_processes_validate_on_batches_of_similar_length(tiny_bert: str, tmp_path: Path) -> None:
    module = ready(tiny_bert, write_sst2(tmp_path / "sst2", validation=200), eval_batch_size=10)
    for rank in (0, 1):
        lengths = [batch["attention_mask"].sum(1) for batch in in_process(module, rank, 2).val_dataloader()]
        assert sum(int(each.max() - each.min()) for each in lengths) / len(lengths) < 4


def test_more_processes_than_samples(sst2: GLUE) -> None:
    told = r"11 sample\(s\) in 'validation split of SST-2'; at least 12 are needed .* Lower trainer.devices"
    for rank in range(12):
        with pytest.raises(TooFewSamplesError, match=told):
            in_process(sst2, rank, 12).val_dataloader()


def test_lightning_tells_the_sampler_the_epoch(sst2: GLUE) -> None:
    seen: list[list[tuple[int, ...]]] = [[], []]

    class Recorder(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            seen[self.current_epoch] += rows([batch])
            return self.weight.sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Recorder(), datamodule=sst2)
    assert seen[0] != seen[1]
    assert sorted(seen[0]) == sorted(seen[1]) == sorted(map(tuple, sst2.split("train")["input_ids"]))


# Calibration.


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("max_samples", [None, 10, 1])
def test_processes_partition_the_calibration_samples(sst2: GLUE, world_size: int, max_samples: int | None) -> None:
    whole = sst2.calibration_batches(4, max_samples, seed=3)
    shares = [sst2.calibration_batches(4, max_samples, 3, rank, world_size) for rank in range(world_size)]
    assert sorted(row for share in shares for row in rows(share)) == sorted(rows(whole))
    assert {share.fingerprint for share in shares} == {whole.fingerprint}
    assert {share.num_samples for share in shares} == {len(rows(whole))} == {max_samples or 37}
    assert all(len(list(share)) == len(share) for share in shares)


def test_calibration_is_repeatable_and_leaves_the_random_state_alone(sst2: GLUE) -> None:
    before = torch.get_rng_state()
    batches = sst2.calibration_batches(4, 20, seed=1)
    first, second = list(batches), list(batches)
    assert same(first, second)
    assert torch.equal(before, torch.get_rng_state())


def test_equal_fingerprints_mean_equal_batches(sst2: GLUE, tiny_bert: str, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = [
        {"batch_size": 4, "max_samples": 20},
        {"batch_size": 4, "max_samples": 20, "seed": 1},
        {"batch_size": 4, "max_samples": 21},
        {"batch_size": 5, "max_samples": 20},
    ]
    again = ready(tiny_bert, tmp_path / "sst2", cache_dir=str(tmp_path / "elsewhere"))
    other = ready(tiny_bert, write_sst2(tmp_path / "other", seed=1))
    fingerprints = set()
    for arguments in asked:
        one, two = sst2.calibration_batches(**arguments), again.calibration_batches(**arguments)
        assert one.fingerprint == two.fingerprint
        assert same(list(one), list(two))
        fingerprints |= {one.fingerprint, other.calibration_batches(**arguments).fingerprint}
    assert len(fingerprints) == 2 * len(asked)


def test_padding_on_the_other_side_is_another_fingerprint(sst2: GLUE, tiny_bert: str, tmp_path: Path) -> None:
    other = ready(tiny_bert, tmp_path / "sst2")
    other.load_tokenizer().padding_side = "left"
    assert other.content("train") == sst2.content("train")
    one, two = sst2.calibration_batches(4), other.calibration_batches(4)
    assert not same(list(one), list(two))
    assert one.fingerprint != two.fingerprint


def test_calibration_batches_are_sorted_by_length(sst2: GLUE) -> None:
    lengths = [len(row) for row in rows(sst2.calibration_batches(4))]
    assert lengths == sorted(lengths)


def test_calibration_refuses_nonsense(sst2: GLUE) -> None:
    with pytest.raises(ArgumentRangeError, match=r"batch_size=0; allowed is 1 or more. Check calibration.batch_size"):
        sst2.calibration_batches(0)
    with pytest.raises(ArgumentRangeError, match=r"max_samples=0; allowed is 1 or .*. Check calibration.max_samples"):
        sst2.calibration_batches(1, 0)


# Preparation.


def test_prepared_data_are_reused(tiny_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_sst2(tmp_path / "sst2")
    first = ready(tiny_bert, folder)
    # The first call left its truncation in the tokenizer: a second one must not take that for another tokenizer.
    first.prepare_data()

    def refuse(self: GLUE) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(GLUE, "read", refuse)
    assert ready(tiny_bert, folder).fingerprint == first.fingerprint


def test_other_content_length_or_tokenizer_is_prepared_anew(tiny_bert: str, tmp_path: Path) -> None:
    folder = write_sst2(tmp_path / "sst2")
    other = save_tiny_model("bert", tmp_path / "other_model")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["film good"])
    tokenizer.save_pretrained(other)
    modules = [
        ready(tiny_bert, folder),
        ready(tiny_bert, folder, max_length=8),
        ready(tiny_bert, folder, max_train_samples=9),
        ready(tiny_bert, folder, max_train_samples=9, seed=1),
        ready(str(other), folder),
        ready(tiny_bert, write_sst2(folder, seed=1)),
    ]
    cache = tmp_path / "cache" / "data"
    assert len(list(cache.iterdir())) == len(modules)
    assert len({module.fingerprint for module in modules}) >= len(modules) - 1


def test_a_failed_preparation_leaves_nothing(tiny_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, text: str, **_: Any) -> int:
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", fail)
        with pytest.raises(OSError, match="disk full"):
            ready(tiny_bert, write_sst2(tmp_path / "sst2"))
    assert list((tmp_path / "cache" / "data").iterdir()) == []


def test_prepared_data_that_have_lost_a_part_are_prepared_anew(tiny_bert: str, tmp_path: Path) -> None:
    folder = write_sst2(tmp_path / "sst2")
    first = ready(tiny_bert, folder)
    (entry,) = (tmp_path / "cache" / "data").iterdir()
    (entry / "meta.json").unlink()
    assert ready(tiny_bert, folder).fingerprint == first.fingerprint
    assert (entry / "meta.json").is_file()
    assert list(entry.parent.iterdir()) == [entry]


def test_setup_alone_prepares(tiny_bert: str, tmp_path: Path) -> None:
    module = GLUE(tiny_bert, "sst2", str(write_sst2(tmp_path / "sst2")), max_length=64)
    module.setup("validate")
    assert len(module.split("train")) == 37


def test_a_subset_is_random_and_seeded(tiny_bert: str, tmp_path: Path) -> None:
    folder = write_sst2(tmp_path / "sst2")
    texts = [tuple(ids) for ids in ready(tiny_bert, folder).split("train")["input_ids"]]
    chosen = [
        [tuple(ids) for ids in ready(tiny_bert, folder, max_train_samples=9, seed=seed).split("train")["input_ids"]]
        for seed in (0, 0, 1)
    ]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(set(chosen[0])) == 9
    assert set(chosen[0]) < set(texts)
    assert chosen[0] != texts[:9]
    assert len(ready(tiny_bert, folder, max_train_samples=1000).split("train")) == 37


def test_a_class_without_a_training_sample_is_told(tiny_bert: str, tmp_path: Path) -> None:
    for name in ("train", "dev"):
        rows = [["good", "1"], ["better", "1"], ["bad", "0"]]
        write_tsv(tmp_path / "few" / f"{name}.tsv", ["sentence", "label"], rows)
    seed = next(seed for seed in range(9) if sorted(choose(3, 2, seed)) == [0, 1])
    with pytest.warns(UserWarning, match="GLUE: no training sample is of class 'negative', .*max_train_samples"):
        ready(tiny_bert, tmp_path / "few", max_train_samples=2, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ready(tiny_bert, tmp_path / "few")


def test_truncation_is_counted_and_told(
    tiny_bert: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Lengths with [CLS] and [SEP]: 9, 10, 11, 22; at 10 the last two are cut.
    texts = [["good " * size, str(size % 2)] for size in (7, 8, 9, 20)]
    for name in ("train", "dev"):
        write_tsv(tmp_path / "cut" / f"{name}.tsv", ["sentence", "label"], texts)
    with pytest.warns(UserWarning, match=r"2 of 4 train samples \(50.0%\) were cut at max_length=10; .* 22 tokens"):
        cut = ready(tiny_bert, tmp_path / "cut", max_length=10)
    assert (cut.truncation["train"].truncated, cut.truncation["train"].longest) == (2, 22)
    assert cut.split("train")["length"][:] == [9, 10, 10, 10]
    rank_zero_log.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, logger=rank_zero_log.name):
            ready(tiny_bert, tmp_path / "cut", max_length=22)
    finally:
        rank_zero_log.removeHandler(caplog.handler)
    assert "GLUE: 4 train samples, none cut; the longest has 22 tokens." in caplog.text


# Refusals.


def test_nothing_is_known_before_setup(tiny_bert: str, tmp_path: Path) -> None:
    module = GLUE(tiny_bert, "sst2", str(write_sst2(tmp_path)))
    for asked in (lambda: module.target, lambda: module.fingerprint, lambda: module.calibration_batches(1)):
        with pytest.raises(DataNotReadyError, match=r"has not been set up. Call prepare_data"):
            asked()


@pytest.mark.parametrize(
    ("argument", "value", "allowed"),
    [
        ("batch_size", 0, "1 or more"),
        ("eval_batch_size", -1, "1 or more"),
        ("max_train_samples", 0, "1 or more"),
        ("pad_to_multiple_of", 0, "1 or more"),
        ("num_workers", -1, "0 or more"),
        ("seed", -1, "0 or more"),
    ],
)
def test_numbers_out_of_range(argument: str, value: int, allowed: str) -> None:
    with pytest.raises(ArgumentRangeError, match=f"{argument}={value}; allowed is {allowed}. Check data.init_args"):
        GLUE("any", "sst2", None, "matched", "error", "error", **{argument: value})


@pytest.mark.parametrize(
    ("family", "max_length", "told"),
    [
        ("bert", 129, "max_length=129 is longer than the longest input of this model; allowed is 8 to 128"),
        ("bert", 7, "max_length=7 leaves no room for a text; allowed is 8 to 128"),
        # Its first position is that after the padding id, 0 here.
        ("roberta", 128, "max_length=128 is longer than the longest input of this model; allowed is 8 to 127"),
    ],
)
def test_max_length_the_model_cannot_take(tmp_path: Path, family: str, max_length: int, told: str) -> None:
    model = save_tiny_model(family, tmp_path / "model")
    with pytest.raises(MaxLengthError, match=told):
        ready(str(model), write_sst2(tmp_path / "sst2"), max_length=max_length)


def test_relative_positions_set_no_limit(tmp_path: Path) -> None:
    model = save_tiny_model("deberta-v2", tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 10**30
    tokenizer.save_pretrained(model)
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(
        config.replace('"position_biased_input": true', '"position_biased_input": false')
    )
    assert ready(str(model), write_sst2(tmp_path / "sst2"), max_length=500).max_length == 500


def test_tokenizer_without_a_pad_token(tmp_path: Path) -> None:
    model = save_tiny_model("bert", tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(model)
    with pytest.raises(MissingTokenError, match="has no pad token, which is needed to put sentences of different"):
        ready(str(model), write_sst2(tmp_path / "sst2"))


def test_every_argument_is_told_on_the_command_line() -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(TextDataModule, "data")
    config = parser.parse_args(["--data=GLUE", "--data.tokenizer=x", "--data.task=rte", "--data.max_length=64"])
    assert config.data.init_args.max_length == 64
    single = ArgumentParser()
    single.add_class_arguments(GLUE, "data")
    told = " ".join(single.format_help().split())
    assert "special tokens included; longer texts are cut" in told
    assert "Validate MNLI on the genres of the training split" in told
