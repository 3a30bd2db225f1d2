"""Plain fine-tuning, the default and the baseline."""

from lowrank_pl.strategies.base import CompressionStrategy


class NoCompression(CompressionStrategy):
    """Leaves every layer as it is: dense layers dense, factorised layers (of `init_from`) factorised."""

    @classmethod
    def why_not_sharded(cls) -> str:
        """It can: it changes nothing."""
        return ""
