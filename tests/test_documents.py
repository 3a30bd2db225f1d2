"""The documents agree with the code: the table of imports, the maps of formulas and features, one spelling."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_house import FOREIGN, LIMITS, PACKAGE, ROOMS, STRANGERS

ROOT = Path(__file__).parents[1]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
STRATEGIES = (PACKAGE / "strategies" / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", PACKAGE / "strategies" / "README.md"]
DOCUMENTS += sorted((ROOT / "docs").glob("*.md"))
PLACE = re.compile(r"`([\w/]+\.py)`: (`[\w.]+`(?:, `[\w.]+`)*)")


def rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its first two lines."""
    section = text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    table = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table[2:]]


def never_imports(room: str) -> str:
    """As the third column of the table of imports."""
    before = ROOMS[: ROOMS.index(room)]
    strange = [other for other in before if (room, other) in STRANGERS or (other, room) in STRANGERS]
    if strange and strange == before:
        return "all of the above"
    return ", ".join(strange) or "\N{EN DASH}"


def third_party(room: str) -> str:
    """As the last column of the table of imports."""
    if room in FOREIGN:
        return ", ".join(sorted(FOREIGN[room])) or "none"
    missing = [package for package, allowed in LIMITS.items() if room not in allowed]
    return f"any but {' and '.join(missing)}" if missing else "any"


def test_the_table_of_imports_is_the_one_that_is_enforced() -> None:
    told = [
        [name.strip("`"), never, packages] for name, _, never, packages in rows(CONTRIBUTING, "Packages and imports")
    ]
    assert told == [[room, never_imports(room), third_party(room)] for room in ROOMS if room != "__main__"]


def defined(path: Path) -> set[str]:
    """`function`, `Class` and `Class.method` of a file, and names that it assigns at its top level."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def places(cell: str) -> Iterator[tuple[str, str]]:
    """Files and names of `file.py`: `name`, `name`."""
    for path, names in PLACE.findall(cell):
        for name in re.findall(r"[\w.]+", names):
            yield path, name


def test_every_formula_is_where_its_map_says() -> None:
    mapped = rows(STRATEGIES, "Where each formula is")
    found = [place for row in mapped for place in places(row[1])]
    assert len(mapped) >= 15
    assert all(list(places(row[1])) for row in mapped)
    assert [(path, name) for path, name in found if name not in defined(PACKAGE / path)] == []


def test_what_planned_features_change_is_there() -> None:
    for _, _, changes in rows(CONTRIBUTING, "Planned features"):
        files = re.findall(r"[\w/]+\.py", changes)
        assert files
        assert [path for path in files if not (PACKAGE / path).exists()] == []
        assert [(path, name) for path, name in places(changes) if name not in defined(PACKAGE / path)] == []


def test_the_tests_that_the_table_of_lightnings_features_names_are_there() -> None:
    text = (ROOT / "docs" / "lightning.md").read_text(encoding="utf-8")
    names = set(re.findall(r"\btest_\w+(?=`)", text))
    assert len(names) > 20
    written = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert {name for name in names if f"def {name}(" not in written} == set()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_one_spelling(path: Path) -> None:
    """Titles of papers (in quotations, `>`) keep theirs, and so does code."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith(">")]
    text = re.sub(r"`[^`\n]*`", "", "\n".join(lines)).replace("Kronecker-factored", "")
    assert re.findall(r"\b\w*factoriz\w*|\b(?:re)?factored\b", text, re.IGNORECASE) == []


def headings(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a document."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\]\(.*?\)", "", title).lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings_that_are_there(document: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8"))
    local = [link.partition("#") for link in links if "://" not in link]
    for to, _, heading in local:
        path = (document.parent / to).resolve() if to else document
        assert path.exists(), to
        assert not heading or heading in headings(path), f"{to}#{heading}"
