"""The methods that grids compare, by name, as arguments of the command line."""

from __future__ import annotations

STRATEGY = "--model.init_args.strategy"
_TEACHER, _TEN = "--model.init_args.distillation=Distillation", "--trainer.max_epochs=10"
_FEW = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=64", "--model.init_args.optimizer.init_args.lr=1e-4"]


def _strategy(name: str, *options: str, few: bool = True) -> list[str]:
    """A strategy by class name with its options; measured on few samples if it measures any."""
    made = [f"{STRATEGY}={name}"]
    made += [f"{STRATEGY}.init_args.calibration.max_samples=2048"] if few else []
    return [*made, *(f"{STRATEGY}.init_args.{option}" for option in options)]


def _kronecker(*options: str) -> list[str]:
    return _strategy("KroneckerSVD", *options)


def _plain(*options: str) -> list[str]:
    return _kronecker("refit=false", *options)


def _rankdyna(*options: str) -> list[str]:
    return ["--config", "configs/recipes/glue_rankdyna.yaml"] + [f"{STRATEGY}.init_args.{option}" for option in options]


def _metric(*options: str) -> list[str]:
    return _rankdyna(*(f"sensitivity.init_args.{option}" for option in options))


STATIC: dict[str, list[str]] = {
    "SVD": _strategy("SVD", few=False),
    "FWSVD input": _strategy("FWSVD", "side=input"),
    "FWSVD output": _strategy("FWSVD", "side=output"),
    "FWSVD both": _strategy("FWSVD", "side=both"),
    "FWSVD both, global": _strategy("FWSVD", "side=both", "allocation=Global"),
    "TFWSVD": _strategy("TFWSVD"),
    "KroneckerSVD": _kronecker(),
    "KroneckerSVD recalibrated": _kronecker("recalibration=Recalibration"),
    "KroneckerSVD without refit": _plain(),
    "KroneckerSVD without refit, recalibrated": _plain("recalibration=Recalibration"),
    # The ablation: the factors alone.
    "KroneckerSVD uniform": _plain("allocation=Uniform"),
    "KroneckerSVD input": _plain("side=input"),
    "KroneckerSVD output": _plain("side=output"),
    "KroneckerSVD diagonal": _plain("diagonal=true"),
    "KroneckerSVD floor 0": _plain("allocation=Global", "allocation.init_args.floor=0"),
    "KroneckerSVD floor 0.5": _plain("allocation=Global", "allocation.init_args.floor=0.5"),
    "KroneckerSVD damping 0.0001": _plain("damping=0.0001"),
    "KroneckerSVD damping 0.01": _plain("damping=0.01"),
    "KroneckerSVD damping 0.1": _plain("damping=0.1"),
    **{
        f"KroneckerSVD {samples} {labels}": _plain(f"calibration.max_samples={samples}", f"calibration.labels={labels}")
        for samples in (64, 256, 1024)
        for labels in ("observed", "sampled")
    },
    "KroneckerSVD all observed": _plain("calibration.max_samples=null"),
    "KroneckerSVD all sampled": _plain("calibration.max_samples=null", "calibration.labels=sampled"),
    "KroneckerSVD 1 epoch": [*_kronecker(), "--trainer.max_epochs=1"],
    "KroneckerSVD distilled": [*_kronecker(), _TEACHER],
    # As little as can be tuned: 2,048 samples once, as many as are measured.
    **{
        f"KroneckerSVD 64 steps{told}": [*_kronecker(), *_FEW, *more]
        for told, more in (("", []), (" distilled", [_TEACHER]))
    },
    **{
        f"KroneckerSVD lr {lr}{told}": [*_kronecker(), f"--model.init_args.optimizer.init_args.lr={lr}", *more]
        for lr in ("1e-5", "1e-4", "2e-4", "3e-4")
        for told, more in (
            ("", []),
            (" distilled", [_TEACHER]),
            (" 10 epochs", [_TEN]),
            (" distilled, 10 epochs", [_TEACHER, _TEN]),
        )
    },
}

ROUND: dict[str, list[str]] = {
    "dense": [f"{STRATEGY}=NoCompression"],
    "RankDyna": _rankdyna(),
    # The score, and the schedule of many small steps, that were the default before.
    "RankDyna FirstOrder": _rankdyna(
        "sensitivity=lowrank_pl.importance.FirstOrder",
        "sensitivity.init_args.beta=0.85",
        "schedule.init_args.warmup=0.05",
        "schedule.init_args.interval=0.02",
    ),
    "RankDyna 4 steps": _metric("steps=4"),
    "RankDyna 8 steps": _metric("steps=8"),
    "RankDyna 32 steps": _metric("steps=32"),
    "RankDyna all tokens": _metric("max_tokens=null"),
    "RankDyna 256 tokens": _metric("max_tokens=256"),
    "RankDyna 1 reallocation": _rankdyna("schedule.init_args.interval=0.2"),
    "RankDyna 2 reallocations": _rankdyna("schedule.init_args.interval=0.1"),
    "RankDyna 8 reallocations": _rankdyna("schedule.init_args.interval=0.025"),
    "RankDyna early": _rankdyna("schedule.init_args.warmup=0.15", "schedule.init_args.cooldown=0.65"),
    "RankDyna late": _rankdyna("schedule.init_args.warmup=0.45", "schedule.init_args.cooldown=0.35"),
    "RankDyna last": _rankdyna("schedule.init_args.warmup=0.6", "schedule.init_args.cooldown=0.2"),
    "RankDyna floor 0": _rankdyna("floor=0"),
    "RankDyna floor 0.5": _rankdyna("floor=0.5"),
    "RankDyna damping 0.01": _metric("damping=0.01"),
    "RankDyna rewarmup": _rankdyna("schedule.init_args.rewarmup=0.03"),
    "RankDyna lr 1e-4": [*_rankdyna(), "--model.init_args.optimizer.init_args.lr=1e-4"],
}


def _decoder(name: str, *options: str) -> list[str]:
    """A strategy for decoders; the study says how many windows it is measured on."""
    return [f"{STRATEGY}={name}", *(f"{STRATEGY}.init_args.{option}" for option in options)]


DECODERS: dict[str, list[str]] = {
    "SVD": _decoder("SVD", "refit=false"),
    "FWSVD input": _decoder("FWSVD", "side=input", "refit=false"),
    "FWSVD both": _decoder("FWSVD", "side=both", "refit=false"),
    "whitening": _decoder("KroneckerSVD", "side=input", "refit=false"),
    # What SVD-LLM does, with both factors made for the inputs that compressed blocks give.
    "whitening, sequential": _decoder(
        "KroneckerSVD", "side=input", "refit=false", "sequential=BlockByBlock", "sequential.init_args.toward=own_inputs"
    ),
    # And with its closed-form update of left factors, on inputs and outputs of the dense model besides.
    "whitening, refit": _decoder("KroneckerSVD", "side=input", "refit=lowrank_pl.strategies.Refit"),
    "whitening, sequential to dense outputs": _decoder("KroneckerSVD", "side=input", "refit=false", "sequential=true"),
    "KroneckerSVD uniform": _decoder("KroneckerSVD", "allocation=Uniform", "refit=false"),
    "KroneckerSVD": _decoder("KroneckerSVD", "refit=false"),
    "KroneckerSVD refit": _decoder("KroneckerSVD", "refit=lowrank_pl.strategies.Refit"),
    "KroneckerSVD uniform, sequential": _decoder(
        "KroneckerSVD", "allocation=Uniform", "refit=false", "sequential=true"
    ),
    "KroneckerSVD sequential": _decoder("KroneckerSVD", "refit=false", "sequential=true"),
}
