"""A kill at any moment of an export leaves a whole folder, old or new, or none; and the next export succeeds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from lowrank_pl.errors.outputs import OutputExistsError
from lowrank_pl.export import export, from_pretrained
from tests.export.killed import ALWAYS, FRESH, FULL, OVER
from tests.export.test_export import checkpoint, logits
from tests.support.forks import Forks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kills forks of a process that has loaded torch")
KILLS = [*((point, kind) for point in ALWAYS for kind in ("fresh", "over"))]
KILLS += [*((point, "fresh") for point in FRESH), *((point, "over") for point in OVER)]
FILES = {"README.md", "SHA256SUMS", "config.json", "modeling_lowrank.py", "tokenizer.json", "tokenizer_config.json"}
NEW = {"after-the-rename", "after-the-exchange", "while-removing", "two-renames", "three-renames"}


class Killed:
    """What the killed exports have left."""

    def __init__(self, forks: Forks, where: Path, pretrained: str) -> None:
        self.where = where
        self.source = str(where / "model.ckpt")
        self.expected: Tensor = logits(checkpoint(pretrained, where / "model.ckpt").encoder)
        forks.run([str(Path(__file__).with_name("killed.py")), self.source, str(where)], where)

    def output(self, point: str, kind: str) -> Path:
        return self.where / point / kind / "out"

    def check_whole(self, output: Path) -> None:
        names = {path.name for path in output.iterdir()}
        assert names >= FILES
        assert len([name for name in names if name.endswith(".safetensors")]) > 2
        assert torch.equal(logits(from_pretrained(str(output))), self.expected)
        assert AutoTokenizer.from_pretrained(output)("a film")["input_ids"]


@pytest.fixture(scope="module")
def killed(everything_loaded: Forks, tiny_bert: str, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    return Killed(everything_loaded, tmp_path_factory.mktemp("killed"), tiny_bert)


def is_old(output: Path) -> bool:
    files = sorted(str(path.relative_to(output)) for path in output.rglob("*") if path.is_file())
    return files == ["file.txt", "sub/mine.txt"] and (output / "file.txt").read_text() == "old"


@pytest.mark.parametrize(("point", "kind"), KILLS)
def test_the_folder_is_whole_and_the_next_export_succeeds(killed: Killed, point: str, kind: str) -> None:
    output = killed.output(point, kind)
    left = {path.name for path in output.parent.iterdir()} - {"told"}
    assert all(name == "out" or name.startswith(".out.") for name in left), left
    if point in NEW:
        killed.check_whole(output)
    elif point == "one-rename":
        assert not output.exists()
        assert {Path(name).suffix for name in left} == {".aside", ".part"}
        with pytest.raises(OutputExistsError):
            export(killed.source, str(output))
        assert is_old(output)
    elif kind == "over":
        assert is_old(output)
        assert len(left) == 2
    else:
        assert not output.exists()
        assert len(left) == 1
    export(killed.source, str(output), overwrite=True, max_shard_size="20KB")
    killed.check_whole(output)


@pytest.mark.parametrize("point", list(FULL))
def test_a_real_failure_to_write_is_told_and_leaves_nothing(killed: Killed, point: str) -> None:
    for kind in ("fresh", "over"):
        output = killed.output(point, kind)
        told = (output.parent / "told").read_text()
        assert told.startswith(f"OutputNotWritableError the output folder {str(output)!r} cannot be made (")
        assert "File too large" in told
        assert {path.name for path in output.parent.iterdir()} == ({"told", "out"} if kind == "over" else {"told"})
        assert kind == "fresh" or is_old(output)
