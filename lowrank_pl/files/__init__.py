"""How outputs are written: as a whole or not at all, by the user's umask; which files of a folder are read."""

from lowrank_pl.files.atomic import all_or_nothing, check_output
from lowrank_pl.files.modes import follow_umask

__all__ = ["all_or_nothing", "check_output", "follow_umask"]
