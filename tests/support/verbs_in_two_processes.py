"""Every verb of the command line, strategy after strategy: `verbs_in_two_processes.py FOLDER PROCESSES ARGUMENTS…`.

One process alone, or two with the variables of a launcher. Every process saves what it ended with.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from lowrank_pl.cli import main
from lowrank_pl.errors import LowRankError
from lowrank_pl.errors.numerics import NonFiniteError
from lowrank_pl.strategies import SVD
from lowrank_pl.tasks import EncoderTask

CONFIGS = Path(__file__).parents[2] / "configs"
COMPRESSING = ("svd", "fwsvd", "tfwsvd", "kronecker", "sequential")
# All static methods factorise in `fit` as they do in `compress`; one of them trains, whose ranks depend on the data.
TRAINING = ("none", "kronecker", "rankdyna")
RESUMED = ("kronecker", "rankdyna")  # what has a state of its own
EVALUATED = ("rankdyna",)  # samples are divided alike whatever the model is
found: dict[str, Any] = {}


def record() -> None:
    """Keeps each process's logged scores, and its weights after training and after compressing."""

    class Recorder(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            found[f"{trainer.logger.version} fit"] = weights(pl_module)  # type: ignore[union-attr]

        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.state.fn == "validate":
                found[f"{trainer.logger.version} validate"] = weights(pl_module)  # type: ignore[union-attr]

        def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            scores = {name: float(value) for name, value in trainer.callback_metrics.items()}
            found[f"{trainer.logger.version} test"] = scores  # type: ignore[union-attr]

    before = EncoderTask.configure_callbacks

    def configure_callbacks(self: EncoderTask) -> Any:
        return [*before(self), Recorder()]

    EncoderTask.configure_callbacks = configure_callbacks  # type: ignore[method-assign]


def weights(pl_module: pl.LightningModule) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in pl_module.state_dict().items()}


def run(folder: Path, common: list[str], processes: int) -> None:
    """All verbs, in folders `<strategy>-<verb>` of the logger; one process does what two are compared with."""
    for name in dict.fromkeys((*TRAINING, *COMPRESSING)):
        recipe = {"none": "glue_finetune", "sequential": "glue_kronecker"}.get(name, f"glue_{name}")
        base = ["--config", str(CONFIGS / "recipes" / f"{recipe}.yaml"), *common]

        def version(verb: str, name: str = name) -> str:
            return f"--trainer.logger.init_args.version={name}-{verb}"

        if processes > 1 and name in TRAINING:
            runs = folder / "logs" / "runs"
            teacher = taught(runs / "none-fit" / "checkpoints" / "last.ckpt", name)
            main(["fit", *base, *teacher, version("fit")])
            last = f"--ckpt_path={runs / f'{name}-fit' / 'checkpoints' / 'last.ckpt'}"
            if name in RESUMED:
                main(["fit", *base, *teacher, version("resume"), "--trainer.max_epochs=2", last])
            if name in EVALUATED:
                final = f"--ckpt_path={runs / f'{name}-resume' / 'checkpoints' / 'last.ckpt'}"
                main(["test", *base, version("test"), final])
                main(["predict", *base, version("predict"), final])
        if name in COMPRESSING:
            option = "--model.init_args.strategy.init_args"
            chosen = {
                "kronecker": f"{option}.refit=lowrank_pl.strategies.Refit",
                "sequential": f"{option}.sequential=true",
            }
            more = [chosen[name]] if name in chosen else []
            main(["compress", *base, *more, version("compress"), f"--output={folder / f'{name}-compressed'}"])
    main(["diagnose", *base, version("diagnose"), f"--output={folder / 'diagnosis'}"])
    score_decoder(common)


def score_decoder(common: list[str]) -> None:
    """The decoder beside the encoder, on seven windows, the last of which is not full."""
    (encoder,) = (Path(word.partition("=")[2]) for word in common if "pretrained" in word)
    model, text = encoder.parent / "decoder", encoder.parent / "text.txt"
    common = [word for word in common if "--data" not in word and "pretrained" not in word]
    words = ["--config", str(CONFIGS / "recipes" / "causal_lm_kronecker.yaml"), *common]
    words += [f"--data.init_args.{split}={text}" for split in ("train", "validation", "test")]
    words += ["--data.init_args.window=16", "--data.init_args.eval_batch_size=2"]
    main(["test", *words, f"--model.init_args.pretrained={model}", "--trainer.logger.init_args.version=decoder"])


def taught(teacher: Path, name: str) -> list[str]:
    """The methods learn from the dense model: one in every step, the other from answers that are kept."""
    option = "--model.init_args.distillation"
    how = {"kronecker": {}, "rankdyna": {"hidden_states": 0, "cache": "true"}}.get(name)
    if how is None:
        return []
    return [f"{option}=Distillation", *(f"{option}.init_args.{k}={v}" for k, v in {"teacher": teacher, **how}.items())]


def fail(folder: Path, common: list[str]) -> None:
    """Compresses while the second process cannot factorise its share, and keeps what each process raises."""
    decompose = SVD.decompose

    def failing(self: SVD, *args: Any) -> Any:
        if os.environ.get("LOCAL_RANK") == "1":
            raise NonFiniteError("a weight of the second process")
        return decompose(self, *args)

    SVD.decompose = failing  # type: ignore[method-assign,assignment]
    recipe = ["--config", str(CONFIGS / "recipes" / "glue_svd.yaml")]
    output = f"--output={folder / 'failed'}"
    try:
        main(["compress", *recipe, *common, "--trainer.logger.init_args.version=failed", output])
    except LowRankError as error:
        found["failure"] = f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    record()
    place = Path(sys.argv[1])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(place, sys.argv[3:], int(sys.argv[2]))
        if int(sys.argv[2]) > 1:
            fail(place, sys.argv[3:])
    told = [str(warning.message) for warning in caught if "sync_dist" in str(warning.message)]
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    torch.save(found, place / f"found-{rank}.pt")
    (place / f"warnings-{rank}.json").write_text(json.dumps(told))
