from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_pl.data import TextCorpus
from lowrank_pl.data.collate import FixedMasking
from lowrank_pl.data.text_corpus import pack
from lowrank_pl.errors.data import ArgumentRangeError, EmptyDataError, MissingTokenError
from tests.data.samples import sentence, write
from tests.support.tiny import save_tiny_model, tiny_tokenizer


def corpus(folder: Path, lines: int = 100, seed: int = 0) -> dict[str, str]:
    rng = random.Random(seed)
    text = "".join(f" {sentence(rng)} \n" + " \n" * (at % 7 == 0) for at in range(lines))
    return {
        "train": str(write(folder / "train.txt", text)),
        "validation": str(write(folder / "valid.txt", text[: len(text) // 2])),
    }


def ready(tokenizer: str, **arguments: Any) -> TextCorpus:
    module = TextCorpus(tokenizer, **{"max_length": 32, "batch_size": 4, "eval_batch_size": 4, **arguments})
    module.prepare_data()
    module.setup()
    return module


def by_content(batches: Any) -> dict[tuple[int, ...], tuple[list[int], list[int]]]:
    """What is shown and asked of each block, by the block itself."""
    found = {}
    for batch in batches:
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            shown, asked = ids[mask.bool()], labels[mask.bool()]
            found[tuple(torch.where(asked >= 0, asked, shown).tolist())] = (shown.tolist(), asked.tolist())
    return found


def test_blocks_hold_the_whole_text_in_order(tiny_bert: str, tmp_path: Path) -> None:
    files = corpus(tmp_path)
    module = ready(tiny_bert, **files)
    tokenizer = module.load_tokenizer()
    blocks = module.split("train")["input_ids"][:]
    assert all(len(block) == 32 for block in blocks[:-1])
    assert all(block[0] == tokenizer.cls_token_id and block[-1] == tokenizer.sep_token_id for block in blocks)
    joined = [token for block in blocks for token in block[1:-1]]
    assert joined == tokenizer(Path(files["train"]).read_text(), add_special_tokens=False)["input_ids"]
    assert (module.target.kind, module.target.metrics) == ("masked_lm", ("perplexity",))


def test_pack_by_hand() -> None:
    blocks = pack(torch.arange(5), torch.tensor([8]), torch.tensor([9, 9]), 5)
    assert [block.tolist() for block in blocks] == [[8, 0, 1, 9, 9], [8, 2, 3, 9, 9], [8, 4, 9, 9]]


def test_evaluation_masks_depend_on_content_and_seed_alone(tiny_bert: str, tmp_path: Path) -> None:
    files = corpus(tmp_path)
    one = ready(tiny_bert, **files)
    other = ready(tiny_bert, **files, eval_batch_size=3)
    # The same text begins both splits: the masks must agree across loaders, batches and splits.
    first, second = by_content(one.val_dataloader()), by_content(other.val_dataloader())
    calibration = by_content(one.calibration_batches(5, seed=0))
    assert first == second
    shared = [block for block in first if block in calibration]
    assert len(shared) > 5
    assert all(first[block] == calibration[block] for block in shared)
    assert by_content(ready(tiny_bert, **files, seed=1).val_dataloader()) != first


def test_calibration_masks_do_not_move_the_random_state(tiny_bert: str, tmp_path: Path) -> None:
    module = ready(tiny_bert, **corpus(tmp_path))
    before = torch.get_rng_state()
    batches = module.calibration_batches(4, 10, seed=2)
    assert by_content(batches) == by_content(batches)
    assert torch.equal(before, torch.get_rng_state())


def test_calibration_fingerprint_knows_the_masks(tiny_bert: str, tmp_path: Path) -> None:
    files = corpus(tmp_path)
    fingerprints = {
        ready(tiny_bert, **files, **arguments).calibration_batches(4, seed=seed).fingerprint
        for arguments in ({}, {"mlm_probability": 0.3}, {"pad_to_multiple_of": 8})
        for seed in (0, 1)
    }
    assert len(fingerprints) == 6


def test_training_masks_anew(tiny_bert: str, tmp_path: Path) -> None:
    loader = ready(tiny_bert, **corpus(tmp_path)).train_dataloader()
    assert by_content(loader) != by_content(loader)


def test_what_is_masked() -> None:
    tokenizer = tiny_tokenizer()
    words = [tokenizer.convert_tokens_to_ids(word) for word in ("good", "bad", "film")]
    mask, unknown = tokenizer.mask_token_id, tokenizer.unk_token_id
    samples = [{"input_ids": [2, *([word, unknown] * 500), 3], "attention_mask": [1] * 1002} for word in words]
    batch = FixedMasking(tokenizer, 0.2, seed=5)(samples)
    asked = batch["labels"] >= 0
    original = torch.tensor([sample["input_ids"] for sample in samples])
    assert torch.equal(batch["labels"][asked], original[asked])
    assert torch.equal(batch["input_ids"][~asked], original[~asked])
    assert not asked[(original == unknown) | (original == 2) | (original == 3)].any()
    assert asked.sum() / 1500 == pytest.approx(0.2, abs=0.04)
    shown = batch["input_ids"][asked]
    assert (shown == mask).float().mean() == pytest.approx(0.8, abs=0.07)
    assert (shown == original[asked]).float().mean() == pytest.approx(0.1, abs=0.06)


def test_every_sample_has_something_to_predict() -> None:
    tokenizer = tiny_tokenizer()
    samples = [{"input_ids": [2, word, 3], "attention_mask": [1, 1, 1]} for word in range(20, 60)]
    batch: dict[str, Tensor] = FixedMasking(tokenizer, 0.01)(samples)
    assert ((batch["labels"] >= 0).sum(1) == 1).all()
    assert (FixedMasking(tokenizer, 0.01)([{"input_ids": [2, 3]}])["labels"] == -100).all()


def test_subsets_are_of_blocks(tiny_bert: str, tmp_path: Path) -> None:
    files = corpus(tmp_path)
    whole = {tuple(ids) for ids in ready(tiny_bert, **files).split("train")["input_ids"]}
    module = ready(tiny_bert, **files, max_train_samples=5)
    assert {tuple(ids) for ids in module.split("train")["input_ids"]} < whole
    assert len(module.split("train")) == module.truncation["train"].samples == 5


def test_tests_on_the_test_file(tiny_bert: str, tmp_path: Path) -> None:
    files = corpus(tmp_path)
    module = ready(tiny_bert, **files, test=files["train"])
    assert module.has_labelled_test
    assert len(by_content(module.test_dataloader())) == len(module.split("train"))


def test_refusals(tiny_bert: str, tmp_path: Path) -> None:
    files = corpus(tmp_path)
    with pytest.raises(ArgumentRangeError, match=r"mlm_probability=1.0; allowed is above 0 and below 1"):
        TextCorpus("any", **files, mlm_probability=1.0)
    with pytest.raises(EmptyDataError, match=r"no samples in '.*empty.txt'"):
        ready(tiny_bert, **{**files, "validation": str(write(tmp_path / "empty.txt", " \n\n"))})
    model = save_tiny_model("bert", tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.mask_token = None
    tokenizer.save_pretrained(model)
    with pytest.raises(MissingTokenError, match="has no mask token, which is needed for masked language modelling"):
        ready(str(model), **files)
