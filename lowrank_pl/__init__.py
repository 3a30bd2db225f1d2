"""Low-rank compression of transformers as PyTorch Lightning strategies.

Importing this package is light: `lowrank_pl.core` needs torch alone, and Lightning and transformers load
with the packages that use them (`lowrank_pl.strategies`, `lowrank_pl.tasks`, `lowrank_pl.data`). The first use of
`lowrank_pl.from_pretrained` loads transformers, and never Lightning; that of `lowrank_pl.compress` and
`lowrank_pl.save_pretrained` loads both.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowrank_pl.checkpoint import from_pretrained as from_pretrained
    from lowrank_pl.export import save_pretrained as save_pretrained
    from lowrank_pl.strategies import compress as compress

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "compress":
        from lowrank_pl.strategies import compress

        return compress
    if name == "from_pretrained":
        from lowrank_pl.checkpoint import from_pretrained

        return from_pretrained
    if name == "save_pretrained":
        from lowrank_pl.export import save_pretrained

        return save_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), "compress", "from_pretrained", "save_pretrained"])
