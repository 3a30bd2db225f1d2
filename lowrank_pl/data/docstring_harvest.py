"""First sentences of the docstrings of installed packages, read from their sources without importing them."""

from __future__ import annotations

import ast
import gc
import importlib.metadata
import importlib.util
import inspect
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from datasets.utils import tqdm

from lowrank_pl.errors.data import UnknownPackageError

KNOWN = ("torch", "transformers", "pandas", "scipy", "sklearn", "numpy", "lightning", "torchmetrics")
"""Packages of many documented functions, those of which are used that are installed."""

_ALIASES = {
    "torch": ("pytorch", "aten", "c10d", "torchscript"),
    "transformers": ("huggingface", "hugging face", "hf"),
    "pandas": ("pd",),
    "scipy": (),
    "sklearn": ("scikit-learn", "scikit learn", "scikit"),
    "numpy": ("np", "ndarray"),
    "lightning": ("pl", "pytorch-lightning", "pytorch lightning", "pytorch_lightning", "lightningmodule"),
    "torchmetrics": ("torch metrics",),
}
_NEUTRAL = "library"
_NOT_THE_LIBRARY = {"test", "tests", "testing", "_vendor", "vendor", "externals", "extern", "third_party"}
_LEAST_WORDS = 4
_SECTION = re.compile(
    r"(?:args|arguments|parameters|returns?|yields|raises|notes?|examples?|attributes)\s*(?::|-{3,})", re.I
)
_SENTENCE_END = re.compile(r"(?<!\be\.g)(?<!\bi\.e)(?<!\betc)(?<!\bvs)(?<!\bcf)[.!?](?=\s|$)")


@dataclass(frozen=True, order=True)
class Sentence:
    """A first sentence and what it documents.

    Attributes:
        package: Import name of the package; the class.
        name: Qualified name of the function, class or method; decides the split.
        text: The sentence, without the package's name.
    """

    package: str
    name: str
    text: str


def package_root(package: str) -> Path | None:
    """Returns the folder of an installed package, without importing it, or `None`."""
    try:
        spec = importlib.util.find_spec(package) if "." not in package else None
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(next(iter(spec.submodule_search_locations)))
    return root if root.is_dir() else None


def package_sources(packages: Sequence[str] | None) -> dict[str, list[Path]]:
    """Returns the source files of packages, without their tests and what they carry of others.

    Args:
        packages: Import names, or `None` for those of `KNOWN` that are installed.

    Raises:
        UnknownPackageError: a package that was named is not installed.
    """
    sources = {}
    for package in KNOWN if packages is None else packages:
        root = package_root(package)
        if root is not None:
            files = (path for path in root.rglob("*.py") if _NOT_THE_LIBRARY.isdisjoint(path.relative_to(root).parts))
            sources[package] = sorted(files)
        elif packages is not None:
            raise UnknownPackageError(package, sorted(importlib.metadata.packages_distributions()))
    return sources


def harvest(sources: dict[str, list[Path]]) -> list[Sentence]:
    """Reads the first sentences of all documented functions, classes and methods.

    The names of the packages are masked, sentences that only a name would have told apart are too short to keep,
    and equal sentences are kept once, or not at all if two packages share them.

    Args:
        sources: Source files by package.

    Returns:
        Sentences ordered by package and name.
    """
    mask = _name_mask(list(sources))
    found: dict[str, Sentence] = {}
    shared = set()
    files = [(package, path) for package, paths in sources.items() for path in paths]
    for package, name, docstring in _documented_in(files):
        text = mask.sub(_NEUTRAL, first_sentence(docstring))
        if len(text.split()) < _LEAST_WORDS:
            continue
        key = normalised(text)
        known = found.get(key)
        if known is None or (package, name) < (known.package, known.name):
            found[key] = Sentence(package, name, text)
        if known is not None and known.package != package:
            shared.add(key)
    return sorted(sentence for key, sentence in found.items() if key not in shared)


def _documented_in(files: Sequence[tuple[str, Path]]) -> Iterator[tuple[str, str, str]]:
    # Trees have no cycles, but so many nodes that looking for cycles takes two thirds of the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        for package, path in tqdm(files, desc="Reading docstrings", unit="file"):
            for name, docstring in documented(path, package):
                yield package, name, docstring
    finally:
        if collecting:
            gc.enable()


def documented(path: Path, package: str) -> Iterator[tuple[str, str]]:
    """Yields the qualified name and docstring of everything documented in a file.

    A file that this Python cannot parse documents nothing.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's sources
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return
    parts = path.with_suffix("").parts
    # The innermost folder of that name is the package: site-packages may lie below a folder called the same.
    start = len(parts) - 1 - parts[::-1].index(package) if package in parts else len(parts) - 1
    module = ".".join(part for part in parts[start:] if part != "__init__")
    pending: list[tuple[str, ast.AST]] = [(module, tree)]
    while pending:
        prefix, node = pending.pop()
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                # Definitions under `if` and `try` belong to the module as well.
                if isinstance(child, (ast.If, ast.Try, ast.With)):
                    pending.append((prefix, child))
                continue
            name = f"{prefix}.{child.name}"
            docstring = ast.get_docstring(child, clean=False)
            if docstring:
                yield name, docstring
            if isinstance(child, ast.ClassDef):
                pending.append((name, child))


def first_sentence(docstring: str) -> str:
    """Returns the first sentence of a docstring on one line; empty if it begins with a section."""
    paragraph = re.split(r"\n\s*\n", inspect.cleandoc(docstring), maxsplit=1)[0]
    line = " ".join(paragraph.split())
    if _SECTION.match(line):
        return ""
    end = _SENTENCE_END.search(line)
    return line[: end.end()] if end else line


def normalised(text: str) -> str:
    """Returns what two sentences share that differ in case, punctuation and spaces alone."""
    return " ".join(re.findall(r"\w+", text.lower()))


def split_of(name: str) -> str:
    """Returns the split of a function by its name: 80 % train, 10 % validation, 10 % test.

    The same name is in the same split on every machine and whatever else is installed.
    """
    part = int.from_bytes(sha256(name.encode()).digest()[:4], "big") % 10
    return "validation" if part == 8 else "test" if part == 9 else "train"


def _name_mask(packages: Sequence[str]) -> re.Pattern[str]:
    names = {name for package in packages for name in (package, *_ALIASES.get(package, ()))}
    # `torch` inside `torch_dtype` is a name, too; `np` inside `input` is none.
    told = "|".join(re.escape(name) for name in sorted(names, key=lambda name: (-len(name), name)))
    return re.compile(rf"(?<![^\W_])(?:{told})(?![^\W_])", re.IGNORECASE)
