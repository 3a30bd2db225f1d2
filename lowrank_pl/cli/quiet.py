"""What the command line leaves out of the console: notes of other packages that no user can act on.

One place, one reason each; everything else is shown.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence

from transformers.utils import logging as transformers_logging

_WARNINGS = (
    # Lightning's own use of torch's pytree.
    r".*isinstance\(treespec, LeafSpec\).*is deprecated",
    # Batches are padded from token ids in memory: workers have next to nothing to do.
    r".*does not have many workers which may be a bottleneck",
)
# Scoring a checkpoint takes its weights alone: not its callbacks, and not its list of best checkpoints.
_WARNINGS_OF_SCORING = (
    r".*callbacks used to create the checkpoint need to be provided",
    r"The dirpath has changed from",
)
_ADVERTISEMENT = "💡 Tip: For seamless cloud"  # Lightning recommends its company's services


class _NoAdvertisement(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(_ADVERTISEMENT)


def quieten() -> None:
    """Installs the filters; a second time changes nothing."""
    _ignore(_WARNINGS)
    source = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    if not any(isinstance(known, _NoAdvertisement) for known in source.filters):
        source.addFilter(_NoAdvertisement())
    # Bars over the tensors of a local file, gone in a second. Downloads have bars of their own.
    transformers_logging.disable_progress_bar()


def quieten_scoring() -> None:
    """For the verbs that do not train: leaves out what matters only where a checkpoint is resumed."""
    _ignore(_WARNINGS_OF_SCORING)


def _ignore(messages: Sequence[str]) -> None:
    for message in messages:
        warnings.filterwarnings("ignore", message=message)
