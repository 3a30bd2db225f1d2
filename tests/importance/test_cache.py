import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig

import lowrank_pl.files.tensors as tensors_module
from lowrank_pl.importance import Fisher, FullFisher, ImportanceCache, LayerFisher
from tests.core.matrices import random_importance

CPU = torch.device("cpu")


def some_fisher(full: bool = True) -> Fisher:
    layers = {}
    for seed, name in enumerate(("encoder.layer.1.query", "encoder.layer.0.key")):
        information = random_importance(12, seed=seed).view(3, 4)
        layers[name] = LayerFisher(information.sum(0), information.sum(1), information if full else None)
    return Fisher(layers, 77)


def model() -> nn.Module:
    root = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3, dtype=torch.bfloat16))
    for parameter in root.parameters():
        parameter.data.fill_(0.5)
    return root


def key(
    root: nn.Module | None = None,
    names: tuple[str, ...] = ("0", "2"),
    kind: str = "FullFisher",
    data: str = "mrpc",
    loss: str = "",
) -> str:
    return ImportanceCache.key(root or model(), list(names), kind, data, loss)


@pytest.mark.parametrize("full", [True, False])
def test_round_trip_is_exact(tmp_path: Path, full: bool) -> None:
    cache, fisher = ImportanceCache(tmp_path / "not" / "yet"), some_fisher(full)
    cache.save("k", fisher)
    given = ImportanceCache(tmp_path / "not" / "yet").load("k", CPU, FullFisher())
    assert given is not None
    assert given.num_samples == 77
    assert given.layers.keys() == fisher.layers.keys()
    for name, layer in fisher.layers.items():
        assert torch.equal(given.layers[name].input_sums, layer.input_sums)
        assert torch.equal(given.layers[name].output_sums, layer.output_sums)
        loaded = given.layers[name].full
        assert (loaded is not None) is full
        if layer.full is not None and loaded is not None:
            assert torch.equal(loaded, layer.full)


def test_an_unknown_key_is_absent_without_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = ImportanceCache(tmp_path)
    cache.save("k", some_fisher())
    assert cache.load("other", CPU, FullFisher()) is None
    assert ImportanceCache(tmp_path / "missing").load("k", CPU, FullFisher()) is None
    assert caplog.records == []


def test_saving_leaves_one_file_and_replaces_an_older_one(tmp_path: Path) -> None:
    cache = ImportanceCache(tmp_path)
    cache.save("k", Fisher({}, 1))
    cache.save("k", some_fisher())
    assert [entry.name for entry in tmp_path.iterdir()] == ["k.safetensors"]
    given = cache.load("k", CPU, FullFisher())
    assert given is not None
    assert given.num_samples == 77


def test_a_crash_while_writing_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ImportanceCache(tmp_path)

    def crash(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        Path(path).write_bytes(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(tensors_module, "save_file", crash)
    with pytest.raises(OSError, match="no space"):
        cache.save("k", some_fisher())
    assert list(tmp_path.iterdir()) == []  # what was begun is removed
    assert cache.load("k", CPU, FullFisher()) is None
    monkeypatch.undo()
    cache.save("k", some_fisher())
    assert cache.load("k", CPU, FullFisher()) is not None


def test_a_full_disk_as_safetensors_tells_it_is_an_error_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(tensors_module, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        ImportanceCache(tmp_path).save("k", some_fisher())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_none_counts_as_absent(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert ImportanceCache(tmp_path / "file").load("k", CPU, FullFisher()) is None
    with pytest.raises(OSError, match="file"):
        ImportanceCache(tmp_path / "file").save("k", some_fisher())


class Doubled(nn.Linear):
    """A layer of the user's own, with a setting that no weight tells."""

    factor = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor


def test_a_key_changes_with_the_code_and_settings_of_the_models_own_classes() -> None:
    def own(kind: type[nn.Linear], **settings: object) -> str:
        layer = kind(3, 3)
        for parameter in layer.parameters():
            parameter.data.fill_(0.5)
        vars(layer).update(settings)
        return key(nn.Sequential(layer))

    edited = type("Doubled", (nn.Linear,), {"forward": lambda self, x: x, "__module__": __name__})
    keys = [own(nn.Linear), own(Doubled), own(Doubled, factor=3.0), own(edited)]
    assert len(set(keys)) == len(keys)
    assert own(Doubled) == keys[1]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(b"\x80\x04not safetensors at all" * 9)


def without_metadata(path: Path) -> None:
    save_file(load_file(path), path)


def without_number(path: Path) -> None:
    save_file(load_file(path), path, metadata={"num_samples": "many"})


def without_a_tensor(path: Path) -> None:
    tensors = load_file(path)
    del tensors["encoder.layer.0.key/output_sums"]
    save_file(tensors, path, metadata={"num_samples": "77"})


@pytest.mark.parametrize("damage", [cut, empty, garbage, without_metadata, without_number, without_a_tensor])
def test_a_damaged_file_is_ignored_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    cache = ImportanceCache(tmp_path)
    cache.save("k", some_fisher())
    damage(tmp_path / "k.safetensors")
    with caplog.at_level(logging.WARNING, logger="lowrank_pl"):
        assert cache.load("k", CPU, FullFisher()) is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(tmp_path / "k.safetensors") in record.getMessage()


def test_equal_inputs_have_equal_keys() -> None:
    assert key() == key()
    assert key().isalnum()


def nudged(change: Callable[[nn.Module], object]) -> nn.Module:
    root = model()
    change(root)
    return root


def nudge_first(root: nn.Module) -> None:
    weight = next(root.parameters())
    weight.data[0, 0] = weight.data[0, 0].nextafter(torch.tensor(1.0))


def nudge_half(root: nn.Module) -> None:
    list(root.parameters())[-1].data[0] = 1.0


def nudge_buffer(root: nn.Module) -> None:
    next(root.buffers())[0] = 1.0


def test_a_key_changes_with_everything_the_measurement_depends_on() -> None:
    keys = [
        key(),
        key(nudged(nudge_first)),
        key(nudged(nudge_half)),
        key(nudged(nudge_buffer)),
        key(nudged(lambda root: root.double())),
        key(nn.Sequential(model(), nn.Tanh(), nn.Linear(1, 1))),
        key(names=("0",)),
        key(kind="FisherSums"),
        key(data="sst2"),
        key(loss="mean"),
    ]
    assert len(set(keys)) == len(keys)


def test_a_key_changes_with_the_configuration_at_equal_weights() -> None:
    # Two heads or four: the same weights, another function.
    keys = []
    for heads in (2, 4, 2):
        root = model()
        object.__setattr__(root, "config", BertConfig(num_attention_heads=heads))
        keys.append(key(root))
    assert keys[0] == keys[2] != keys[1]


def test_a_key_changes_with_the_layers_of_torch_at_equal_weights() -> None:
    def layer(heads: int, activation: str) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(nn.TransformerEncoderLayer(8, heads, 8), getattr(nn, activation)())

    keys = [key(layer(heads, activation)) for heads, activation in ((2, "ReLU"), (4, "ReLU"), (2, "GELU"))]
    assert len(set(keys)) == 3
    assert key(layer(2, "ReLU")) == keys[0]


def test_a_key_changes_with_buffers_that_no_checkpoint_holds() -> None:
    def scaled(by: float) -> nn.Module:
        root = model()
        root.register_buffer("scale", torch.tensor(by), persistent=False)
        return root

    assert key(scaled(1.0)) == key(scaled(1.0)) != key(scaled(2.0))


def test_a_key_does_not_change_with_mode_flags_or_gradients() -> None:
    root = model().eval().requires_grad_(False)
    assert key(root) == key(model().train())


def test_a_file_can_be_read_by_whom_the_umask_allows(tmp_path: Path) -> None:
    ImportanceCache(tmp_path).save("k", some_fisher())
    (tmp_path / "plain").touch()
    assert (tmp_path / "k.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
