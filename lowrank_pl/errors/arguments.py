"""What can be wrong with arguments before anything is made of them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lowrank_pl.errors.base import LowRankError


class MissingArgumentError(LowRankError):
    """Something has to be said and was not."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"{what} is missing. {remedy}")


class ExclusiveArgumentsError(LowRankError):
    """Of some arguments that say one thing in several ways, none or several were given.

    Args:
        names: The arguments.
        given: Those that were given.
        where: The key above them, as in YAML.
    """

    def __init__(self, names: Sequence[str], given: Sequence[str], where: str) -> None:
        listed = ", ".join(names)
        if given:
            what = f"{' and '.join(given)} are given together; allowed is exactly one of {listed}"
            remedy = f"Set the others to null, e.g. --{where}.{given[0]}=null."
        else:
            what = f"none of {listed} is given; allowed is exactly one of them"
            remedy = f"Set it as {where}.{names[0]}, for example."
        super().__init__(f"{what}. {remedy}")


class ConstructionError(LowRankError):
    """A class of the configuration rejects its arguments, or needs what is not installed.

    Args:
        reason: What it said.
        name: The class, if that is known.
        remedy: What to do.
    """

    def __init__(self, reason: str, name: str | None, remedy: str) -> None:
        what = f"{name} cannot be made" if name else "the run cannot be set up"
        super().__init__(f"{what} as configured: {' '.join(reason.split()).rstrip('.')}. {remedy}")

    @classmethod
    def of(cls, error: BaseException) -> ConstructionError:
        """From what was raised, which may name the class in a message about all types that were tried."""
        named = re.findall(r"Problem with given class_path '([^']+)':\s*(.*)", str(error))
        path, reason = named[-1] if named else ("", str(error))
        package = re.search(r"not met|No module named|not installed|pip install", reason)
        remedy = "Install the package, or choose another class." if package else "Check the arguments (--print_config)."
        return cls(reason, path.rpartition(".")[2] or None, remedy)


class InterpolationError(LowRankError):
    """A value refers to a variable."""

    def __init__(self, key: str, value: str, variable: str) -> None:
        super().__init__(
            f"{key}={value!r} contains {variable}; variables are not filled in within configurations. Write the value "
            f'out (~ is your home folder), or give it on the command line, where the shell fills it in: --{key} "…".'
        )
