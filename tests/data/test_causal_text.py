"""Windows by hand, every format, calibration, and what is refused before long work."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset, DatasetDict
from lightning.pytorch.trainer.states import TrainerFn

from lowrank_pl.data import CausalText
from lowrank_pl.data.causal_text import WindowCollator, cut
from lowrank_pl.errors.arguments import MissingArgumentError
from lowrank_pl.errors.data import (
    ArgumentRangeError,
    EmptyDataError,
    MaxLengthError,
    MissingTokenError,
    OfflineError,
    WindowError,
)
from lowrank_pl.errors.data_files import MissingFileError, MissingSplitError, NotATextError, UnknownColumnError
from tests.data.samples import write
from tests.support.tiny import save_tiny_decoder, tiny_tokenizer

NONE = torch.empty(0, dtype=torch.long)
TEXT = "the of and to in is that it was for on are with as good bad film great awful plot " * 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_decoder("llama", tmp_path_factory.mktemp("llama") / "model"))


def ready(tokenizer: str, **arguments: Any) -> CausalText:
    module = CausalText(tokenizer, **{"window": 8, "batch_size": 2, "eval_batch_size": 3, **arguments})
    module.prepare_data()
    module.setup()
    return module


def told(pairs: Any) -> list[tuple[list[int], list[int]]]:
    return [(shown.tolist(), labels.tolist()) for shown, labels in pairs]


def test_windows_by_hand() -> None:
    assert told(cut(torch.arange(7), NONE, 3, 3)) == [([0, 1, 2], [-100, 1, 2]), ([3, 4, 5], [-100, 4, 5])]
    overlapping = [
        ([0, 1, 2], [-100, 1, 2]),
        ([2, 3, 4], [-100, 3, 4]),
        ([4, 5, 6], [-100, 5, 6]),
    ]
    assert told(cut(torch.arange(7), NONE, 3, 2)) == overlapping
    assert told(cut(torch.arange(5), torch.tensor([9]), 3, 3)) == [
        ([9, 0, 1, 2], [-100, 0, 1, 2]),
        ([9, 3, 4], [-100, 3, 4]),
    ]


@pytest.mark.parametrize("stride", [1, 2, 5, 7])
@pytest.mark.parametrize("prefix", [NONE, torch.tensor([99])])
def test_overlapping_windows_predict_every_token_once_with_as_much_context(stride: int, prefix: torch.Tensor) -> None:
    windows = cut(torch.arange(23), prefix, 8, stride)
    asked = [int(label) for _, labels in windows for label in labels if label != -100]
    assert asked == list(range(0 if len(prefix) else 1, 23))
    for shown, labels in windows[1:]:
        first = int((labels != -100).nonzero()[0])
        assert first - len(prefix) >= 8 - stride or shown[-1] == 22
        assert torch.equal(shown[labels != -100], labels[labels != -100])


def test_formats_give_the_same_windows(model: str, tmp_path: Path) -> None:
    words = TEXT.split()
    rows = [" ".join(words[:20]), " ".join(words[20:])]
    files = {
        "a.jsonl": "\n".join(json.dumps({"text": row}) for row in rows),
        "b.csv": "text\n" + "\n".join(rows),
    }
    for name, content in files.items():
        write(tmp_path / name, content)
    Dataset.from_dict({"text": [rows[0], None, rows[1]]}).to_parquet(str(tmp_path / "c.parquet"))
    plain = str(write(tmp_path / "plain.txt", " ".join(rows)))
    joined = ready(model, train=plain, validation=plain)
    tokenizer = joined.load_tokenizer()
    ids = tokenizer(" ".join(rows), add_special_tokens=False)["input_ids"]
    assert [token for window in joined.split("validation")["input_ids"] for token in window] == ids
    assert len(joined.split("train")) == len(ids) // 8  # without the last, which is not full
    assert len(ready(model, train=plain, drop_partial=False).split("train")) == -(-len(ids) // 8)
    between = [*ids[:20], tokenizer.eos_token_id, *ids[20:]]
    for name in (*files, "c.parquet"):
        one = ready(model, validation=str(tmp_path / name))
        assert [token for window in one.split("validation")["input_ids"] for token in window] == between, name
        spaced = ready(model, validation=str(tmp_path / name), separator=" ")
        assert [token for window in spaced.split("validation")["input_ids"] for token in window] == ids, name
    begun = ready(model, validation=plain, bos=True).split("validation")
    assert all(window[0] == tokenizer.bos_token_id for window in begun["input_ids"])
    assert [token for window in begun["input_ids"] for token in window[1:]] == ids


def test_data_sets_of_the_hub(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, subset: str | None, split: str | None = None) -> Any:
        asked.append((name, subset, split))
        if name == "nobody/nothing":
            raise ConnectionError("no network")
        if name == "o/script":
            raise RuntimeError("Dataset scripts are no longer supported, but found script.py")
        if name in ("o/broken", str(tmp_path)):
            raise datasets.exceptions.DatasetGenerationError("An error occurred") from ValueError("line 3: no JSON")
        rows = Dataset.from_dict({"text": [TEXT, ""]})
        return DatasetDict({"train": rows, "test": rows, "other": rows}) if split is None else rows

    monkeypatch.setattr(datasets, "load_dataset", load)
    every = ready(model, dataset="o/corpus", subset="raw", separator="\n\n")
    assert set(every.describe()["samples"]) == {"train", "test"}
    assert set(ready(model, dataset="o/corpus", train="train[:10]").describe()["samples"]) == {"train"}
    assert set(asked) == {("o/corpus", "raw", None), ("o/corpus", None, "train[:10]")}
    with pytest.raises(OfflineError, match=r"'nobody/nothing'.*no network.*data.init_args.dataset"):
        ready(model, dataset="nobody/nothing")
    for broken, told in (("o/script", "scripts are no longer supported"), ("o/broken", "line 3: no JSON")):
        with pytest.raises(OfflineError, match=rf"'{broken}'.*\(.*{told}.*or give files"):
            ready(model, dataset=broken)
    with pytest.raises(OfflineError, match=r"cannot load '.*' \(line 3: no JSON\)") as here:
        ready(model, dataset=str(tmp_path))
    assert "HF_HUB_OFFLINE" not in str(here.value)
    with pytest.raises(UnknownColumnError, match="no column 'body' in 'o/corpus"):
        ready(model, dataset="o/corpus", column="body")


def test_calibration_is_of_full_windows_and_found_again(model: str, tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.txt", TEXT))
    module = ready(model, train=path)
    batches = module.calibration_batches(2, 5, seed=1)
    assert batches.num_samples == 5
    for batch in batches:
        assert set(batch) == {"input_ids", "labels"}
        assert batch["input_ids"].shape[1] == 8
        assert torch.equal(batch["labels"][:, 1:], batch["input_ids"][:, 1:])
        assert bool((batch["labels"][:, 0] == -100).all())
    again = ready(model, train=path)
    assert again.fingerprint == module.fingerprint
    assert again.calibration_batches(2, 5, seed=1).fingerprint == batches.fingerprint
    others = [ready(model, train=path, **more).fingerprint for more in ({"window": 9}, {"bos": True})]
    assert len({module.fingerprint, *others}) == 3


def test_a_tokenizer_without_special_tokens_works_where_none_is_needed(model: str, tmp_path: Path) -> None:
    folder = save_tiny_decoder("gpt2", tmp_path / "model")
    bare = tiny_tokenizer()
    for name in ("pad_token", "eos_token", "bos_token", "cls_token", "sep_token", "mask_token"):
        setattr(bare, name, None)
    bare.save_pretrained(folder)
    path = str(write(tmp_path / "a.txt", TEXT))
    module = ready(str(folder), train=path, validation=path)
    assert [len(batch["labels"]) for batch in module.train_dataloader()] == [2, 2, 2, 1]
    *_, last = module.val_dataloader()
    assert last["attention_mask"].sum(1).tolist() == [8, 4] or last["attention_mask"].sum(1).tolist() == [4, 8]
    rows = str(write(tmp_path / "a.jsonl", f'{{"text": "{TEXT}"}}\n' * 2))
    with pytest.raises(MissingTokenError, match=r"no eos token, which is needed between the documents.*separator"):
        ready(str(folder), train=rows)
    with pytest.raises(MissingTokenError, match=r"no bos token, .* leave data.init_args.bos out"):
        ready(str(folder), train=path, bos=True)


def test_padding_is_on_the_right_and_masked() -> None:
    samples: list[dict[str, Any]] = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"input_ids": [5, 6], "labels": [-100, 6]},
    ]
    batch = WindowCollator(fill=1, pad_to_multiple_of=4)(samples)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1], [5, 6, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100], [-100, 6, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]


def test_refusals(model: str, tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.txt", TEXT))
    with pytest.raises(MissingArgumentError, match="a corpus is missing"):
        CausalText(model)
    with pytest.raises(ArgumentRangeError, match="stride=9; allowed is 1 to 8"):
        CausalText(model, path, window=8, stride=9)
    with pytest.raises(MaxLengthError, match="window=-5 leaves no room for a text"):
        CausalText(model, path, window=-5, stride=1)
    with pytest.raises(MaxLengthError, match=r"100 is padded to 192 tokens.*multiple_of=96 allowed is 8 to 96\."):
        ready(model, train=path, window=100, pad_to_multiple_of=96)
    with pytest.raises(MaxLengthError, match="window=129 is longer than the longest input of this model"):
        ready(model, train=path, window=129)
    with pytest.raises(WindowError, match="the test split has 60 tokens, which do not fill one window of 100"):
        ready(model, test=path, window=100)
    with pytest.raises(EmptyDataError, match=r"empty\.txt'; at least one is needed\. Check the file\.$"):
        ready(model, train=str(write(tmp_path / "empty.txt", " \n\n")))
    with pytest.raises(NotATextError, match="has a list in column 'text'"):
        ready(model, train=str(write(tmp_path / "a.jsonl", '{"text": ["a"]}')))
    numbers = str(write(tmp_path / "n.jsonl", '{"text": "a b c d e f"}\n{"text": 5}\n{"text": null}'))
    assert ready(model, validation=numbers).split("validation")["length"][:] == [8]  # with a token between the two
    with pytest.raises(MissingSplitError, match="no train split"):
        ready(model, test=path).calibration_batches(2)


def test_files_that_a_verb_does_not_read_need_not_be_there(model: str, tmp_path: Path) -> None:
    files = {"train": str(tmp_path / "train.txt"), "validation": str(write(tmp_path / "valid.txt", TEXT))}
    module = CausalText(model, **files, window=8)  # type: ignore[arg-type]
    module.trainer = SimpleNamespace(state=SimpleNamespace(fn=TrainerFn.VALIDATING), distributed_sampler_kwargs=None)  # type: ignore[assignment]
    module.prepare_data()
    module.setup()
    assert len(module.val_dataloader()) > 0
    with pytest.raises(MissingFileError, match=r"no data file at '.*train.txt'.* Check data.init_args.train"):
        module.calibration_batches(4)
    with pytest.raises(MissingFileError, match=r"train.txt"):
        ready(model, **files)
