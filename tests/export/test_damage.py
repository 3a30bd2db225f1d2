"""An exported folder with a flipped bit, a lost piece or things that do not belong there."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowrank_pl.errors import LowRankError
from lowrank_pl.errors.checkpoint import DamagedWeightsError, NotACheckpointError
from lowrank_pl.export import export, from_pretrained
from lowrank_pl.tasks import SequenceClassification
from tests.export.test_export import CLASSES, checkpoint, load_remotely, logits
from tests.files.test_weight_files import Marker
from tests.support.forks import Forks

Load = Callable[[Path], Tensor]


def by_from_pretrained(where: Path) -> Tensor:
    return logits(from_pretrained(str(where)))


def by_init_from(where: Path) -> Tensor:
    task = SequenceClassification(init_from=str(where))
    task.build(CLASSES)
    return logits(task.encoder)


@pytest.fixture(scope="module")
def exported(tiny_bert: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model in three forms; tests work on copies."""
    where = tmp_path_factory.mktemp("exported")
    checkpoint(tiny_bert, where / "model.ckpt")
    source = str(where / "model.ckpt")
    return {
        "one file": export(source, str(where / "out")),
        "shards": export(source, str(where / "shards"), max_shard_size="20KB"),
        "dense": export(source, str(where / "dense"), "dense"),
        "dense shards": export(source, str(where / "dense-shards"), "dense", max_shard_size="20KB"),
    }


@pytest.fixture
def copy(exported: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Makes a copy of an exported form."""
    return lambda form: Path(shutil.copytree(exported[form], tmp_path / "copied"))


def flip(file: Path, position: int, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << bit
    file.write_bytes(content)


def header_size(file: Path) -> int:
    with file.open("rb") as stream:
        return 8 + int(struct.unpack("<Q", stream.read(8))[0])


WAYS = [by_from_pretrained, by_init_from]
FACTORED = [("one file", load) for load in WAYS] + [("shards", load) for load in WAYS]
EVERY = [*FACTORED, ("dense", by_init_from), ("dense shards", by_init_from)]


@pytest.mark.parametrize(("form", "load"), EVERY)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_a_flipped_bit_among_the_values_is_found(
    copy: Callable[[str], Path], form: str, load: Load, share: float
) -> None:
    where = copy(form)
    load(where)
    file = sorted(where.glob("*.safetensors"))[-1]
    start, end = header_size(file), file.stat().st_size - 1
    flip(file, int(start + share * (end - start)), bit=int(7 * share))
    with pytest.raises(DamagedWeightsError, match=rf"{file.name}.*damaged or was replaced.*remove SHA256SUMS"):
        load(where)


def test_without_checksums_nobody_would_notice(copy: Callable[[str], Path]) -> None:
    where = copy("one file")
    before = by_from_pretrained(where)
    (where / "SHA256SUMS").unlink()
    assert torch.equal(by_from_pretrained(where), before)
    flip(where / "model.safetensors", header_size(where / "model.safetensors") + 100, bit=6)  # of an embedding
    by_from_pretrained(where)


@pytest.mark.parametrize(("form", "load"), EVERY)
@pytest.mark.parametrize("position", [0, 3, 7, 8, 20, -1], ids=lambda position: f"byte {position}")
def test_a_flipped_bit_in_the_header_is_found(
    copy: Callable[[str], Path], form: str, load: Load, position: int
) -> None:
    where = copy(form)
    file = min(where.glob("*.safetensors"))
    flip(file, position if position >= 0 else header_size(file) + position, bit=1)
    with pytest.raises(DamagedWeightsError, match=file.name):
        load(where)
    (where / "SHA256SUMS").unlink()
    if position in (3, 7, 8):  # neither a length nor JSON any more: refused on its own
        with pytest.raises(LowRankError):
            load(where)


@pytest.mark.parametrize(("form", "load"), EVERY)
@pytest.mark.parametrize("rest", [0, 1, 7, 100, -1])
def test_a_truncated_file_is_found(copy: Callable[[str], Path], form: str, load: Load, rest: int) -> None:
    where = copy(form)
    file = min(where.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:rest])
    with pytest.raises(DamagedWeightsError, match=file.name):
        load(where)
    (where / "SHA256SUMS").unlink()
    with pytest.raises(LowRankError, match=r"safetensors is damaged|no readable weights"):
        load(where)


@pytest.mark.parametrize("load", WAYS)
def test_a_flipped_bit_in_the_index_is_found(copy: Callable[[str], Path], load: Load) -> None:
    where = copy("shards")
    index = where / "model.safetensors.index.json"
    flip(index, index.read_text().index("total_size") + 1, bit=0)  # a harmless place
    with pytest.raises(DamagedWeightsError, match="index"):
        load(where)


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="there is no sha256sum here")
@pytest.mark.parametrize("form", ["one file", "shards", "dense", "dense shards"])
def test_sha256sum_checks_the_folder(copy: Callable[[str], Path], form: str) -> None:
    where = copy(form)
    command = ["sha256sum", "-c", "--strict", "SHA256SUMS"]
    good = subprocess.run(command, cwd=where, capture_output=True, text=True, check=True)
    assert good.stdout.count(": OK") == len(list(where.glob("model*.safetensors*"))) > 0
    flip(max(where.glob("*.safetensors")), -1, bit=0)
    assert subprocess.run(command, cwd=where, capture_output=True, check=False).returncode == 1


def test_weights_changed_on_purpose_load_once_the_checksums_are_removed(copy: Callable[[str], Path]) -> None:
    where = copy("one file")
    state = load_file(where / "model.safetensors")
    save_file({**state, "classifier.bias": state["classifier.bias"] + 1}, where / "model.safetensors")
    with pytest.raises(DamagedWeightsError, match="trained further and saved over, remove SHA256SUMS"):
        by_from_pretrained(where)
    expected = by_from_pretrained_of_state(where, state)
    (where / "SHA256SUMS").unlink()
    torch.testing.assert_close(by_from_pretrained(where), expected + 1)


def by_from_pretrained_of_state(where: Path, state: dict[str, Tensor]) -> Tensor:
    """The logits of other weights in the same folder."""
    other = Path(shutil.copytree(where, where.with_name("other")))
    (other / "SHA256SUMS").unlink()
    save_file(state, other / "model.safetensors")
    return by_from_pretrained(other)


@pytest.mark.parametrize("sizes", [("20KB", "40KB"), ("20KB", "50GB"), ("50GB", "20KB")])
def test_a_model_saved_over_itself_leaves_nothing_of_the_first_save(
    exported: dict[str, Path], tmp_path: Path, sizes: tuple[str, str]
) -> None:
    model: Any = from_pretrained(str(exported["one file"]))
    model.save_pretrained(tmp_path / "again", max_shard_size=sizes[0])
    with torch.no_grad():
        model.classifier.bias += 1
    model.save_pretrained(tmp_path / "again", max_shard_size=sizes[1])
    model.save_pretrained(tmp_path / "new", max_shard_size=sizes[1])
    assert torch.equal(by_from_pretrained(tmp_path / "again"), logits(model))
    names = [sorted(file.name for file in (tmp_path / name).iterdir()) for name in ("again", "new")]
    assert names[0] == names[1]
    assert (tmp_path / "again" / "SHA256SUMS").read_text() == (tmp_path / "new" / "SHA256SUMS").read_text()


def test_another_process_than_the_main_one_writes_nothing(exported: dict[str, Path], tmp_path: Path) -> None:
    from_pretrained(str(exported["one file"])).save_pretrained(tmp_path / "out", is_main_process=False)
    assert not list((tmp_path / "out").iterdir())


def poisoned(where: Path, form: str) -> None:
    """Puts weights beside the weights: other values under the same names, and a name that there is not."""
    file = min(where.glob("*.safetensors"))
    state = {name: tensor + 9 for name, tensor in load_file(file).items()}
    save_file({**state, "more": torch.zeros(1)}, where / "model-00099-of-00099.safetensors")
    if form == "one file":
        save_file(state, where / "model-00001-of-00002.safetensors")


@pytest.mark.parametrize(("form", "load"), EVERY)
def test_a_stale_shard_changes_nothing(copy: Callable[[str], Path], form: str, load: Load) -> None:
    where = copy(form)
    before = load(where)
    poisoned(where, form)
    assert torch.equal(load(where), before)


@pytest.mark.parametrize(("form", "load"), [*FACTORED[2:], EVERY[-1]])
def test_one_file_beside_shards_is_refused(
    copy: Callable[[str], Path], exported: dict[str, Path], form: str, load: Load
) -> None:
    where = copy(form)
    whole = exported["dense" if form.startswith("dense") else "one file"]
    shutil.copy(whole / "model.safetensors", where)
    with pytest.raises(NotACheckpointError, match="has both"):
        load(where)


@pytest.mark.parametrize(("form", "load"), [*FACTORED[2:], EVERY[-1]])
def test_a_missing_shard_is_refused(copy: Callable[[str], Path], form: str, load: Load) -> None:
    where = copy(form)
    lost = sorted(where.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(NotACheckpointError, match=rf"names '{lost.name}', which is missing"):
        load(where)


def with_traps(where: Path) -> Path:
    """Adds files that leave a mark when they are unpickled or imported; returns the mark."""
    mark = where.parent / "mark"
    (where / "notes.txt").write_text("mine")
    for name in ("pytorch_model.bin", "training_args.bin", "model.pkl", "optimizer.pt"):
        (where / name).write_bytes(pickle.dumps(Marker(mark)))
    trap = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
    for name in ("evil.py", "__init__.py", "configuration_bert.py", "sitecustomize.py"):
        (where / name).write_text(trap)
    return mark


@pytest.mark.parametrize(("form", "load"), EVERY)
def test_other_files_are_neither_run_nor_unpickled(copy: Callable[[str], Path], form: str, load: Load) -> None:
    where = copy(form)
    before = load(where)
    mark = with_traps(where)
    assert torch.equal(load(where), before)
    assert not mark.exists()


@pytest.mark.parametrize(("form", "load"), FACTORED)
def test_the_module_file_is_not_run_here(copy: Callable[[str], Path], form: str, load: Load) -> None:
    where = copy(form)
    before = load(where)
    (where / "modeling_lowrank.py").write_text("raise SystemExit('run')\n")
    assert torch.equal(load(where), before)


def test_other_files_are_ignored_where_the_package_is_not_installed(
    transformers_loaded: Forks, copy: Callable[[str], Path], tmp_path: Path
) -> None:
    where = copy("shards")
    before = by_from_pretrained(where)
    mark = with_traps(where)
    poisoned(where, "shards")
    (found,) = load_remotely(transformers_loaded, "AutoModelForSequenceClassification", tmp_path, where)
    assert torch.equal(found, before)
    assert not mark.exists()


def test_a_config_that_names_code_is_not_followed_here(copy: Callable[[str], Path]) -> None:
    where = copy("dense")
    before = by_init_from(where)
    mark = with_traps(where)
    config = json.loads((where / "config.json").read_text())
    auto_map = dict.fromkeys(("AutoConfig", "AutoModelForSequenceClassification"), "evil.Model")
    (where / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    assert torch.equal(by_init_from(where), before)
    assert not mark.exists()
