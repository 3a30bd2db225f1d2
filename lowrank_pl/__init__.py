"""Low-rank compression of transformers as PyTorch Lightning strategies.

Importing this package is light: `lowrank_pl.core` needs torch alone, and Lightning and transformers load
with the rooms that use them (`lowrank_pl.strategies`, `lowrank_pl.tasks`, `lowrank_pl.data`).
"""

__version__ = "0.1.0"
