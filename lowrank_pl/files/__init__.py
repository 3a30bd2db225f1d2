"""How outputs are written: as a whole or not at all, by the user's umask; which files of a folder are read."""

from lowrank_pl.files.modes import follow_umask
from lowrank_pl.files.output import OutputFolder, replace_text

__all__ = ["OutputFolder", "follow_umask", "replace_text"]
