"""What reaches the hub is the whole folder, whichever way it is pushed; nothing leaves this machine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import modeling_utils
from transformers.utils import hub

from lowrank_pl.export import export, from_pretrained
from lowrank_pl.files.checksums import CHECKSUMS, verify_checksums
from tests.export.test_export import checkpoint

WHOLE = {"config.json", "model.safetensors", "modeling_lowrank.py", CHECKSUMS}


class Card:
    """A model card that is not looked up on the hub."""

    def save(self, path: str) -> None:
        Path(path).write_text("card", encoding="utf-8")


@pytest.fixture
def model(tiny_bert: str, tmp_path: Path) -> Any:
    checkpoint(tiny_bert, tmp_path / "model.ckpt")
    export(str(tmp_path / "model.ckpt"), str(tmp_path / "out"))
    return from_pretrained(str(tmp_path / "out"))


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The files that each upload found."""
    found: list[set[str]] = []

    def upload(self: Any, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> str:
        assert repo_id == "me/small"
        verify_checksums(Path(working_dir), ["model.safetensors"])
        found.append({path.name for path in Path(working_dir).iterdir()})
        return "url"

    api = SimpleNamespace(create_repo=lambda name, **kwargs: SimpleNamespace(repo_id=f"me/{Path(name).name}"))
    for module in (modeling_utils, hub):
        monkeypatch.setattr(module, "hf_api", lambda: api)
        monkeypatch.setattr(module, "create_and_tag_model_card", lambda *args, **kwargs: Card())
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
    return found


def test_saving_with_push_to_hub_uploads_the_whole_folder(model: Any, uploads: list[set[str]], tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "small", push_to_hub=True)
    (found,) = uploads
    assert found >= WHOLE


def test_pushing_uploads_the_whole_folder(model: Any, uploads: list[set[str]]) -> None:
    model.push_to_hub("small")
    (found,) = uploads
    assert found >= WHOLE
