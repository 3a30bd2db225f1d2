"""What jsonargparse says about an argument, in a sentence.

It tells of every type that an argument could have had, nested as deep as the configuration. What matters are the
innermost complaint, the keys that lead to it and the class whose argument it is.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

_STRUCTURE = ("Does not validate against", "Subtypes:", "Errors:", "Given value")
_MOST_NAMES = 16


@dataclass(frozen=True)
class _Complaint:
    """An innermost line with what stands above it.

    Attributes:
        text: The line.
        keys: Keys from the outermost to the innermost.
        owner: Class path of the class that the innermost key or option belongs to, if any.
        base: Class path of what should have been given, if a class was asked for.
        depth: How far the line is indented.
    """

    text: str
    keys: tuple[str, ...]
    owner: str | None
    base: str | None
    depth: int


def shortened(message: str, options: Sequence[str]) -> str:
    """One or two sentences from a message of jsonargparse.

    Args:
        message: As it is given to `ArgumentParser.error`.
        options: The options of the verb, as they are written, e.g. `--ckpt_path`.
    """
    if unknown := re.match(r"unrecognized arguments: (.*)", message, re.DOTALL):
        return _unknown_options(unknown[1], options)
    if unknown := re.match(r"Subcommand '\w+' does not accept option '([^']+)'", message):
        return f"no option {unknown[1]!r}.{_meant(unknown[1], [option.removeprefix('--') for option in options])}"
    if missing := re.match(r"the following arguments are required: (.*)", message, re.DOTALL):
        return _missing(missing[1])
    found = list(_complaints(message))
    if not found or not re.search(r'^Parser key "', message, re.MULTILINE):
        return _joined(message)
    deepest = max(complaint.depth for complaint in found)
    return _told([complaint for complaint in found if complaint.depth == deepest], message)


def _complaints(message: str) -> Iterator[_Complaint]:
    """Every innermost line."""
    above: list[tuple[int, str, str]] = []  # indentation, kind, value
    for line in message.splitlines():
        text = line.strip().removeprefix("- ")
        depth = len(line) - len(line.lstrip(" -"))
        if not text:
            continue
        above = [entry for entry in above if entry[0] < depth]
        if key := re.match(r'Parser key "([^"]+)":(.*)', text):
            above.append((depth, "key", key[1]))
            if not key[2].strip():
                continue
            text, depth = key[2].strip(), depth + 1
        elif problem := re.match(r"Problem with given class_path '([^']+)'", text):
            above.append((depth, "owner", problem[1]))
            continue
        elif base := re.match(r"Subtypes: \[<class '([^']+)'>", text):
            # The alternatives' complaints stand below, indented by as much or more.
            above.append((depth - 1, "base", base[1]))
            continue
        elif text.startswith(_STRUCTURE) or text == "Expected a <class 'NoneType'>":
            continue
        text = re.sub(r"^Type .+ expects a function or a callable class: (.*?)(?:\. Got value: .*)?$", r"\1", text)
        values = {kind: value for _, kind, value in above}
        keys = tuple(value for _, kind, value in above if kind == "key")
        yield _Complaint(text, keys, values.get("owner"), values.get("base"), depth)


def _told(found: Sequence[_Complaint], message: str) -> str:
    first = found[0]
    given = re.search(r"Given value: (?:NestedArg\(key='[^']*', val=)?'?(.*?)'?\)?$", message, re.MULTILINE)
    place = f"--{'.init_args.'.join(first.keys)}" if first.keys else ""
    if refused := re.match(r"Option '([^']+)' is not accepted", first.text):
        return _unknown_argument(refused[1], first.owner, place)
    if unknown := re.match(r"Expected a dot import path string: (.+)", first.text):
        return _unknown_class(unknown[1], first.base, place)
    if re.match(r"Expected an instantiatable class, but \S+ is abstract", first.text):
        names = sorted(_short_names(cls)) if (cls := _load(first.base)) is not None else []
        listed = f", one of {', '.join(names)}," if 0 < len(names) <= _MOST_NAMES else ""
        return f"{place} gets an argument before its class is known. Name the class first{listed} as {place} NAME."
    if choice := re.match(r"Expected a typing\.Literal\[(.*)\]\. Got value: (.*)", first.text):
        allowed = re.findall(r"'([^']*)'", choice[1])
        told = getattr(_load(first.owner), "choices_told", {}).get(first.keys[-1] if first.keys else "", "")
        meant = _meant(choice[2], allowed)
        return f"{place} {choice[2]!r} is none of {', '.join(allowed)}.{meant}{f' {told}' if told else ''}"
    expected = [re.match(r"Expected an? <class '(?:[\w.]*\.)?(\w+)'>", complaint.text) for complaint in found]
    if all(expected):
        kinds = " or ".join(dict.fromkeys(match[1] for match in expected if match))
        quote = kinds == "str" and given is not None and re.search(r"\b(True|False)\b", given[1])
        hint = " YAML reads yes, no, on and off as true and false: quote them." if quote else ""
        return f"{place} expects {kinds}{f', not {given[1]!r}' if given else ''}.{hint}"
    told = _joined(" ".join(dict.fromkeys(complaint.text for complaint in found)))
    return f"{place}: {told}" if place else told


def _unknown_options(words: str, options: Sequence[str]) -> str:
    unknown = words.split()
    named = next((word for word in unknown if word.startswith("-")), unknown[0]).split("=")[0]
    if not named.startswith("-"):
        return f"nothing expects the word {named!r}; options begin with --."
    return f"no option {named}.{_meant(named, options)}"


def _missing(names: str) -> str:
    listed = [f"--{name.strip().split('.', 1)[1] if '.' in name else name.strip()}" for name in names.split(",")]
    hint = " A complete configuration comes by --config, e.g. one of configs/recipes." if "--model" in listed else ""
    return f"{', '.join(listed)} {'is' if len(listed) == 1 else 'are'} missing.{hint}"


def _unknown_argument(name: str, owner: str | None, place: str) -> str:
    cls = _load(owner)
    if cls is None:
        return f"{place} has no argument {name!r}."
    # A class may set an argument of its ancestor itself, from one of another name.
    instead = getattr(cls, "length_argument", name) if name == "max_length" else name
    if instead != name:
        return f"{cls.__name__} ({place}) has no argument {name!r}. Did you mean {instead!r}?"
    arguments = [argument for argument in _arguments(cls) if argument != name]
    shown = ", ".join(arguments[:_MOST_NAMES]) + (", …" if len(arguments) > _MOST_NAMES else "")
    takes = f" It takes {shown}." if arguments else " It takes none."
    return f"{cls.__name__} ({place}) has no argument {name!r}.{_meant(name, arguments) or takes}"


def _arguments(cls: type) -> list[str]:
    """The arguments of a constructor, and where it passes further ones on, those of its ancestors."""
    names: dict[str, None] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base) or base is object:
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        names |= {p.name: None for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return list(names)


def _unknown_class(name: str, base: str | None, place: str) -> str:
    cls = _load(base)
    names = [] if cls is None else sorted(_short_names(cls))
    shown = f"; there are {', '.join(names)}" if 0 < len(names) <= _MOST_NAMES else ""
    return (
        f"{place} {name!r} is no class that is known{shown}.{_meant(name, names)} A class of your own is given by its "
        "path, e.g. my_package.MyClass."
    )


def _short_names(base: type) -> set[str]:
    """Names of the classes below a base that can be made; of this package, those that its subpackages offer."""
    found: set[str] = set()
    children: list[type] = base.__subclasses__()
    for cls in children:
        found |= _short_names(cls)
        room = sys.modules.get(".".join(cls.__module__.split(".")[:2]))
        offered = not cls.__module__.startswith("lowrank_pl.") or cls.__name__ in getattr(room, "__all__", ())
        if offered and not inspect.isabstract(cls) and not cls.__name__.startswith("_"):
            found.add(cls.__name__)
    return found


def _load(path: str | None) -> type | None:
    module, _, name = (path or "").rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name) if module else None
    except (ImportError, AttributeError):
        return None
    return found if isinstance(found, type) else None


def _meant(given: str, allowed: Sequence[str]) -> str:
    """Compares the last part of a dotted key as well: what comes before is often right."""
    lowered = {name.lower(): name for name in allowed}
    close = get_close_matches(given.lower(), list(lowered), n=1, cutoff=0.6)
    return f" Did you mean {lowered[close[0]]!r}?" if close else ""


def _joined(message: str) -> str:
    return " ".join(message.split())
