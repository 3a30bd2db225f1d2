"""What a user takes away: Hugging Face folders that load anywhere."""

from lowrank_pl.checkpoint import from_pretrained
from lowrank_pl.export.folder import export
from lowrank_pl.export.saving import save_pretrained

__all__ = ["export", "from_pretrained", "save_pretrained"]
