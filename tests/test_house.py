"""Who may import whom: reads every module of the package and fails on an arrow in the wrong direction."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lowrank_pl

PACKAGE = Path(lowrank_pl.__file__).parent

# From the lowest room to the highest; each may import the ones before it.
ROOMS = [
    "errors",
    "files",
    "core",
    "nn",
    "surgery",
    "importance",
    "allocation",
    "contract",
    "strategies",
    "hub",
    "checkpoint",
    "data",
    "tasks",
    "monitoring",
    "export",
    "benchmark",
    "evaluation",
    "trainer",
    "cli",
    "__main__",
]
# Neighbours that do not know each other, whatever their order.
STRANGERS = [
    ("surgery", "importance"),
    ("importance", "allocation"),
    ("surgery", "allocation"),
    ("data", "tasks"),
    ("strategies", "hub"),
    ("strategies", "checkpoint"),
    ("checkpoint", "data"),
    *(("contract", room) for room in ("errors", "files", "core", "nn", "surgery", "importance", "allocation")),
]
# The packages of others that a room needs beyond the standard library; rooms not listed are free, within LIMITS.
FOREIGN = {
    "": set[str](),
    "errors": set[str](),
    "files": {"torch", "safetensors"},
    "core": {"torch"},
    "nn": {"torch"},
    "surgery": {"torch"},
    "importance": {"torch", "safetensors"},
    "allocation": {"torch"},
    "contract": {"torch"},
}
LIMITS = {
    "lightning": ["strategies", "data", "tasks", "monitoring", "export", "benchmark", "evaluation", "trainer", "cli"],
    "transformers": [
        "hub",
        "checkpoint",
        "data",
        "tasks",
        "monitoring",
        "export",
        "benchmark",
        "evaluation",
        "trainer",
        "cli",
    ],
}


def room_of(module: str) -> str:
    """`lowrank_pl.core.svd` → `core`; the package itself is the room `""`."""
    return [*module.split("."), ""][1]


def imports(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything a module imports, also inside functions and type-checking blocks."""
    parents = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            if start == "lowrank_pl":
                # `from lowrank_pl import data` names a room only after the keyword.
                for alias in node.names:
                    yield node.lineno, f"lowrank_pl.{alias.name}"
            else:
                yield node.lineno, start
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            given = node.args[0] if node.args else None
            if isinstance(given, ast.Constant) and isinstance(given.value, str):
                yield node.lineno, given.value


def objection(importer: str, imported: str) -> str | None:
    """Why one module may not import another, or `None`."""
    room, top = room_of(importer), imported.split(".")[0]
    if top == "lowrank_pl":
        other = room_of(imported)
        if other in ("", "__version__", room):
            return None
        if room == "" and other in ("checkpoint", "export", "strategies"):
            return None  # the front door, opened by its first use: see the test of light imports
        if room == "":
            return "the package itself imports nothing, so that importing it stays light"
        if other not in ROOMS:
            return f"{other!r} is no room of the house"
        if ROOMS.index(other) > ROOMS.index(room):
            return f"{other!r} lies above {room!r}"
        if (room, other) in STRANGERS or (other, room) in STRANGERS:
            return f"{room!r} and {other!r} do not know each other"
        return None
    if top in LIMITS and room not in LIMITS[top]:
        return f"{top!r} may be imported by {', '.join(LIMITS[top])} only"
    if room in FOREIGN and top not in FOREIGN[room] and top not in sys.stdlib_module_names:
        return f"{top!r} is not among what {room!r} needs"
    return None


def wrong_arrows(source: str, module: str, is_package: bool = False) -> list[str]:
    if room_of(module) not in ("", *ROOMS):
        return [f"{module}: {room_of(module)!r} is no room of the house; give it a place in ROOMS"]
    return [
        f"{module}, line {line}, imports {name}: {why}"
        for line, name in imports(source, module, is_package)
        if (why := objection(module, name)) is not None
    ]


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ["lowrank_pl", *path.relative_to(PACKAGE).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def test_every_import_points_downwards() -> None:
    found = modules()
    assert len(found) > 30
    arrows = [
        arrow
        for name, path in found.items()
        for arrow in wrong_arrows(path.read_text(encoding="utf-8"), name, path.name == "__init__.py")
    ]
    assert not arrows, "\n".join(arrows)


def test_the_reader_sees_real_imports() -> None:
    path = modules()["lowrank_pl.strategies.static"]
    names = [name for _, name in imports(path.read_text(encoding="utf-8"), "lowrank_pl.strategies.static", False)]
    assert "lightning.pytorch" in names
    assert "lowrank_pl.core.checks" in names


@pytest.mark.parametrize(
    ("module", "source", "why"),
    [
        ("lowrank_pl.core.svd", "from lowrank_pl.nn import LowRankLinear", "'nn' lies above 'core'"),
        ("lowrank_pl.core.svd", "from ..surgery.swap import Exchange", "'surgery' lies above 'core'"),
        ("lowrank_pl.core.svd", "from .. import nn", "'nn' lies above 'core'"),
        ("lowrank_pl.core.svd", "import lowrank_pl.data.glue as glue", "'data' lies above 'core'"),
        ("lowrank_pl.core.svd", "from lowrank_pl import tasks", "'tasks' lies above 'core'"),
        ("lowrank_pl.core.svd", "def f():\n    import lightning", "'lightning' may be imported by"),
        ("lowrank_pl.core.svd", "import importlib\nimportlib.import_module('transformers')", "'transformers' may be"),
        ("lowrank_pl.core.svd", "import numpy", "'numpy' is not among what 'core' needs"),
        ("lowrank_pl.errors.data", "import torch", "'torch' is not among what 'errors' needs"),
        ("lowrank_pl.nn.linear", "if TYPE_CHECKING:\n    from lowrank_pl.cli import main", "'cli' lies above 'nn'"),
        ("lowrank_pl.importance.fisher", "from lowrank_pl.surgery import Exchange", "do not know each other"),
        ("lowrank_pl.importance.fisher", "import lowrank_pl.allocation", "'allocation' lies above 'importance'"),
        ("lowrank_pl.allocation.uniform", "from lowrank_pl.importance import Fisher", "do not know each other"),
        ("lowrank_pl.allocation.uniform", "from lightning import pytorch", "'lightning' may be imported by"),
        ("lowrank_pl.allocation.uniform", "from lowrank_pl.contract import TargetSpec", "'contract' lies above"),
        ("lowrank_pl.contract", "from lowrank_pl.errors import LowRankError", "do not know each other"),
        ("lowrank_pl.contract", "import numpy", "'numpy' is not among what 'contract' needs"),
        ("lowrank_pl.strategies.svd", "from transformers import AutoModel", "'transformers' may be imported by"),
        ("lowrank_pl.strategies.svd", "from lowrank_pl.hub import load_pretrained", "'hub' lies above"),
        ("lowrank_pl.hub", "import lightning.pytorch as pl", "'lightning' may be imported by"),
        ("lowrank_pl.hub", "from lowrank_pl.checkpoint import build", "'checkpoint' lies above 'hub'"),
        ("lowrank_pl.checkpoint.building", "from lowrank_pl.tasks import MaskedLM", "'tasks' lies above 'checkpoint'"),
        ("lowrank_pl.checkpoint.building", "import lightning.pytorch as pl", "'lightning' may be imported by"),
        ("lowrank_pl.data.glue", "from lowrank_pl.tasks.base import EncoderTask", "'tasks' lies above 'data'"),
        ("lowrank_pl.tasks.base", "from lowrank_pl.data import Glue", "do not know each other"),
        ("lowrank_pl.trainer.trainer", "from lowrank_pl.cli import main", "'cli' lies above 'trainer'"),
        ("lowrank_pl.trainer.trainer", "import lowrank_pl.attic", "'attic' is no room"),
        ("lowrank_pl.attic.old", "import torch", "'attic' is no room"),
        ("lowrank_pl", "from lowrank_pl.core import Factors", "stays light"),
        ("lowrank_pl", "import torch", "'torch' is not among"),
    ],
)
def test_a_wrong_arrow_is_found(module: str, source: str, why: str) -> None:
    (arrow,) = wrong_arrows(source, module, is_package=module == "lowrank_pl")
    assert why in arrow
    assert module in arrow


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("lowrank_pl.core.svd", "import math\nimport torch\nfrom torch import nn\nfrom . import factors"),
        ("lowrank_pl.core.svd", "from lowrank_pl.errors.numerics import ShapeError\nfrom .checks import check_weight"),
        ("lowrank_pl.surgery.swap", "from ..nn import LowRankLinear\nfrom ..core.shapes import LinearShape"),
        ("lowrank_pl.strategies.svd", "import lightning\nfrom lowrank_pl.contract import CalibrationSource"),
        ("lowrank_pl.tasks.base", "from transformers import X\nfrom lowrank_pl.hub import load_pretrained"),
        ("lowrank_pl.cli", "import lowrank_pl.data, lowrank_pl.tasks\nfrom lowrank_pl import __version__"),
    ],
)
def test_right_arrows_pass(module: str, source: str) -> None:
    assert wrong_arrows(source, module) == []


def test_importing_the_low_rooms_loads_no_heavy_package() -> None:
    code = (
        "import sys, lowrank_pl\n"
        "print('torch' in sys.modules)\n"
        "import lowrank_pl.core, lowrank_pl.allocation, lowrank_pl.importance\n"
        "print('torch' in sys.modules)\n"
        "print([name for name in ('lightning', 'transformers', 'datasets', 'matplotlib') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["False", "True", "[]"]


def test_the_front_door() -> None:
    from lowrank_pl.export import from_pretrained, save_pretrained
    from lowrank_pl.strategies import compress

    assert lowrank_pl.from_pretrained is from_pretrained
    assert lowrank_pl.save_pretrained is save_pretrained
    assert lowrank_pl.compress is compress
    assert {"compress", "from_pretrained", "save_pretrained"} < set(dir(lowrank_pl))
    with pytest.raises(AttributeError, match="'lowrank_pl' has no attribute 'nothing'"):
        lowrank_pl.nothing  # noqa: B018


def test_only_nn_asks_for_the_form_of_a_layer() -> None:
    """Whoever else did would have to be found and changed for every new form."""
    pattern = re.compile(r"isinstance\([^()]*,\s*\(?[^()]*\b(LowRankLinear|LowRankEmbedding|SVDLinear|ElasticLinear)\b")
    assert pattern.search("if isinstance(layer, (nn.Linear, SVDLinear)):")
    found = {
        name
        for name, path in modules().items()
        if room_of(name) != "nn" and pattern.search(path.read_text(encoding="utf-8"))
    }
    own = {"lowrank_pl.surgery.groups", "lowrank_pl.strategies.metric_groups", "lowrank_pl.surgery.vocabulary"}
    assert found == own, "only RankDyna's own forms, by what changes their ranks, and factors that two layers share"
