from __future__ import annotations

import gc
from pathlib import Path

import pytest

from lowrank_pl.data.docstring_harvest import (
    Sentence,
    documented,
    first_sentence,
    harvest,
    package_root,
    package_sources,
    split_of,
)
from lowrank_pl.errors.data import UnknownPackageError
from tests.data.samples import module, write


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two packages that cannot be imported."""
    folder = tmp_path / "site"
    files = {
        "alphalib/__init__.py": module({"one": "Adds two numbers in alphalib or ALPHALIB_x."}),
        "alphalib/inner.py": module(
            {
                "two": "Shares this very sentence with others.",
                "three": "Says the same thing twice here.",
                "four": "says the same thing, twice, here",
                "five": "Too short.",
            }
        ),
        "alphalib/tests/test_x.py": module({"test": "Tests are not the library itself."}),
        "alphalib/broken.py": "def (:\n",
        "betalib/__init__.py": module({"one": "Shares this very sentence with others!"}),
        "betalib/sub/deep.py": '''
class Thing:
    """Holds what betalib holds. It is not alphalibrary."""

    async def method(self):
        """Returns e.g. a number of things. And more.

        Args: none.
        """

if True:
    def conditional():
        """Stands under a condition in its module."""
''',
    }
    for name, content in files.items():
        write(folder / name, content)
    monkeypatch.syspath_prepend(str(folder))
    return folder


def test_harvest_of_two_packages(tree: Path) -> None:
    found = harvest(package_sources(["alphalib", "betalib"]))
    assert found == [
        Sentence("alphalib", "alphalib.inner.four", "says the same thing, twice, here"),
        Sentence("alphalib", "alphalib.one", "Adds two numbers in library or library_x."),
        Sentence("betalib", "betalib.sub.deep.Thing", "Holds what library holds."),
        Sentence("betalib", "betalib.sub.deep.Thing.method", "Returns e.g. a number of things."),
        Sentence("betalib", "betalib.sub.deep.conditional", "Stands under a condition in its module."),
    ]
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("A NumPy array made by np.zeros here", "A library array made by library.zeros here"),
        ("Fits scikit-learn and sklearn estimators to data", "Fits library and library estimators to data"),
        ("The input of a numpyro model stays", "The input of a numpyro model stays"),
    ],
)
def test_names_and_aliases_are_masked(tmp_path: Path, text: str, masked: str) -> None:
    path = write(tmp_path / "numpy" / "a.py", module({"f": text}))
    assert [found.text for found in harvest({"numpy": [path], "sklearn": []})] == [masked]


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("One line", "One line"),
        ("\n    Over two\n    lines. More.\n    ", "Over two lines."),
        ("Takes version 2.0 of it. More", "Takes version 2.0 of it."),
        ("Is it so? Yes.", "Is it so?"),
        ("Title\n\nBody. Text.", "Title"),
        ("Args:\n    x: A number.", ""),
        ("Parameters\n----------\nx", ""),
    ],
)
def test_first_sentence(docstring: str, sentence: str) -> None:
    assert first_sentence(docstring) == sentence


def test_qualified_names_start_at_the_innermost_package(tmp_path: Path) -> None:
    path = write(tmp_path / "lib" / "lib" / "m.py", module({"f": "Anything at all here."}))
    assert [name for name, _ in documented(path, "lib")] == ["lib.m.f"]


def test_splits_are_by_name_and_stable() -> None:
    names = [f"package.module.function_{at}" for at in range(3000)]
    counts = {split: sum(split_of(name) == split for name in names) for split in ("train", "validation", "test")}
    assert counts["train"] == pytest.approx(2400, abs=100)
    assert counts["validation"] == pytest.approx(300, abs=70)
    assert counts["test"] == pytest.approx(300, abs=70)
    # Written down once: they must not move between versions.
    assert [split_of(name) for name in ("torch.nn.Linear", "numpy.zeros", "scipy.linalg.svd")] == [
        "train",
        "test",
        "train",
    ]


def test_packages_are_found_without_importing_them(tree: Path) -> None:
    assert package_root("alphalib") == tree / "alphalib"
    assert package_root("no_such_package") is None
    assert package_root("alphalib.inner") is None
    names = [path.name for path in package_sources(["alphalib"])["alphalib"]]
    assert names == ["__init__.py", "broken.py", "inner.py"]


def test_only_installed_ones_by_default() -> None:
    found = package_sources(None)
    assert list(found)[:2] == ["torch", "transformers"]
    assert all(found.values())


def test_a_package_that_is_not_installed() -> None:
    told = r"no sources of a package 'pytorch'.* Install it or check data.init_args.packages"
    with pytest.raises(UnknownPackageError, match=told):
        package_sources(["torch", "pytorch"])
