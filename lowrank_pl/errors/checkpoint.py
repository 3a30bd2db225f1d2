"""What is read back: checkpoints, folders, the layout and the forms of layers in them."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank_pl.errors.base import LowRankError
from lowrank_pl.errors.wording import listed

_CHECKPOINT = "a Lightning checkpoint written by this package (*.ckpt)"

_COMPRESSED = "the --output folder of compress"

_ALLOWED = {  # by the argument that names the path
    "--ckpt_path": (_CHECKPOINT,),
    "export --ckpt_path": (_CHECKPOINT, _COMPRESSED),
    "init_from": (_CHECKPOINT, _COMPRESSED, "a Hugging Face folder"),
    "distillation.teacher": (_CHECKPOINT, _COMPRESSED, "an exported or other Hugging Face folder", "pkg://…", "self"),
    "--models": (_CHECKPOINT, _COMPRESSED, "an exported folder", "a dense model as pretrained names it"),
    "pretrained": ("a hub id", "a Hugging Face folder", "pkg://module/folder"),
    "from_pretrained": ("a folder that export has written in the factorised form",),
}


class NotACheckpointError(LowRankError):
    """A file or folder holds no model this package can read.

    Args:
        path: As the user named it.
        problem: What is wrong with it.
        argument: By which the user named it: a key of `_ALLOWED`.
    """

    def __init__(self, path: str, problem: str, argument: str = "init_from") -> None:
        *first, last = _ALLOWED[argument]
        allowed = f"{', '.join(first)} or {last}" if first else last
        super().__init__(f"{argument}={path!r} cannot be read: {problem}. Allowed is {allowed}.")


class DamagedWeightsError(NotACheckpointError):
    """A file of weights is not the one that was exported."""

    def __init__(self, path: str, found: str, listed: str | None, checksums: str) -> None:
        told = f"lists {listed[:12]}…" if listed is not None else "does not list it"
        LowRankError.__init__(
            self,
            f"{path!r} is damaged or was replaced since the export: its SHA-256 is {found[:12]}…, and {checksums} "
            f"beside it {told}. Only the weights that were exported are loaded. Copy the folder again; if the weights "
            f"were changed on purpose, e.g. trained further and saved over, remove {checksums}.",
        )


class CheckpointMismatchError(LowRankError):
    """Weights and module tree do not belong together."""

    def __init__(self, source: str, problem: str) -> None:
        super().__init__(
            f"{source} does not fit the model: {problem}. Every key and shape must match; nothing was loaded. "
            "Give a checkpoint of the same architecture and head, or another model.init_args.pretrained."
        )

    @classmethod
    def keys(cls, source: str, missing: Sequence[str], unexpected: Sequence[str]) -> CheckpointMismatchError:
        """The error for a state dict with missing or unexpected keys."""
        parts = []
        if missing:
            parts.append(f"missing {listed(missing, 3)}")
        if unexpected:
            parts.append(f"unexpected {listed(unexpected, 3)}")
        return cls(source, "; ".join(parts))


class LayoutVersionError(LowRankError):
    """A layout was written by an incompatible version."""

    def __init__(self, given: object, supported: Sequence[int]) -> None:
        versions = " and ".join(str(version) for version in supported)
        super().__init__(
            f"the low-rank layout has version {given!r}, this release reads versions {versions}. "
            "Load it with the release that wrote it, or upgrade lowrank-pl."
        )


class UnknownFormError(LowRankError):
    """A checkpoint has a layer in a form that is not defined here."""

    def __init__(self, given: str, known: Sequence[str], layer: str | None = None, source: str = "") -> None:
        self.given = given
        self.known = known
        where = f" of layer {layer!r} in {source}" if layer is not None else ""
        super().__init__(
            f"the form {given!r}{where} is unknown; known are {listed(known, 8)}. Import the module that defines it (a "
            "subclass of lowrank_pl.nn.LayerForm) first, or upgrade lowrank-pl."
        )


class FormSpecError(LowRankError):
    """What tells a layer's form and size is incomplete or of a wrong type."""

    def __init__(self, given: object, lacking: str, layer: str | None = None) -> None:
        what = f"layer {layer!r}" if layer is not None else "a layer"
        super().__init__(
            f"{what} is described by {given!r}, which lacks {lacking}. Allowed is what the form's spec() returns, "
            "e.g. {'form': 'low_rank', 'rank': 64}; a checkpoint or config.json that says otherwise was edited or is "
            "damaged."
        )


class QuantizedModelError(LowRankError):
    """A model in eight bits is given where the weights themselves are needed."""

    def __init__(self, source: str, asked_by: str) -> None:
        super().__init__(
            f"{source!r} is in int8, and {asked_by} needs the weights from which it was rounded: they are not in it. "
            "Allowed are validate, test, predict, inspect, benchmark and from_pretrained. Give the checkpoint or the "
            "folder that it was exported from."
        )
