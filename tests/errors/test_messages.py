"""What every message owes its reader; which situations raise which error is tested beside the code that raises."""

import importlib
import inspect
import pkgutil

import pytest

import lowrank_pl.errors
from lowrank_pl.errors import LowRankError
from lowrank_pl.errors.arguments import (
    ConstructionError,
    ExclusiveArgumentsError,
    InterpolationError,
    MissingArgumentError,
)
from lowrank_pl.errors.budget import (
    AllocationError,
    AlreadyCompactedError,
    BudgetAboveStartError,
    BudgetNotReachedError,
    NoTrainingStepError,
    ScheduleError,
)
from lowrank_pl.errors.checkpoint import (
    CheckpointMismatchError,
    DamagedWeightsError,
    FormSpecError,
    LayoutVersionError,
    NotACheckpointError,
    QuantizedModelError,
    UnknownFormError,
)
from lowrank_pl.errors.data import MissingTokenError, WindowError
from lowrank_pl.errors.evaluation import (
    NotALanguageModelError,
    TaskDataError,
    TaskUnusableError,
    TextStartError,
    UnknownHarnessTaskError,
)
from lowrank_pl.errors.export import (
    NonFiniteWeightsError,
    NotSavableError,
    OnnxExportError,
    OnnxMismatchError,
    QuantizationError,
    UntoldChangeError,
)
from lowrank_pl.errors.labels import LabelsError
from lowrank_pl.errors.numerics import (
    BatchShapeError,
    BudgetError,
    BudgetUnitError,
    FormCostError,
    ImportanceError,
    LatencyTableError,
    LossShapeError,
    MemoryBoundError,
    NoGradientError,
    NonFiniteError,
    NonFiniteScoreError,
    RangeError,
    RankError,
    RatioError,
    ShapeError,
)
from lowrank_pl.errors.optimizer import (
    HiddenOptimizerStateError,
    OptimizerArgumentsError,
    OptimizerCoverageError,
    OptimizerStateError,
    UnknownOptimizerStateError,
)
from lowrank_pl.errors.outputs import (
    BlocksMismatchError,
    OutputExistsError,
    OutputNotWritableError,
    RunFolderInUseError,
)
from lowrank_pl.errors.parallelism import (
    ProcessFailedError,
    StartMethodError,
    UnevenValidationError,
    UnsupportedParallelismError,
)
from lowrank_pl.errors.pretrained import (
    FactorisedFolderError,
    HubUnreachableError,
    ModelFolderError,
    NotADecoderError,
    PackageModelError,
    UnsupportedModelError,
    VocabularySizeError,
)
from lowrank_pl.errors.run import (
    BenchmarkResumeError,
    CalibrationError,
    EmbeddingsError,
    EngineError,
    FewSamplesError,
    FrozenFactorsError,
    MissingPackagesError,
    MonitorModeError,
    NotCompressibleError,
    NotFactorisedError,
    NothingToCompressError,
    NothingToScoreError,
    NotOfTextsAloneError,
    ResumeMismatchError,
    RunStoppedError,
    ScoreDropError,
    StrategyPlacementError,
    TargetKindError,
    UnsupportedCallbackError,
)
from lowrank_pl.errors.targets import (
    AlreadyFactorisedError,
    HeadError,
    NoTargetError,
    OverrideError,
    SeveralDevicesError,
    TiedWeightError,
    VocabularyError,
)
from lowrank_pl.errors.teacher import TeacherError

# The error, what was given (quoted in the message), and where to turn.
CASES: list[tuple[LowRankError, list[str], str]] = [
    (
        AlreadyFactorisedError("Net", ["a.b"], ["a.c"]).made_by("SVD", 0.5),
        ["Net", "1 of the 2", "'a.b'", "'a.c'", "SVD, keep_ratio 0.5000"],
        "targets.include",
    ),
    (RunStoppedError("fit", 15, 3, "a b.ckpt"), ["SIGTERM", "step 3", "'a b.ckpt'"], "--ckpt_path='a b.ckpt'"),
    (RunStoppedError("fit", 2, 3), ["SIGINT", "No checkpoint"], "start the run again"),
    (RunStoppedError("test", 15), ["test", "SIGTERM"], "Start it again"),
    (RunStoppedError("compress", 15, kept="small.blocks"), ["compress", "'small.blocks'"], "the same command goes on"),
    (FactorisedFolderError("small"), ["'small'", "factorised layers"], "model.init_args.init_from"),
    (FormCostError("Latency", "low_rank", "pivoted"), ["'low_rank'", "'pivoted'"], "benchmark --form pivoted"),
    (BatchShapeError("dict", "holds tensors of shapes [2], [3]"), ["dict", "[2], [3]"], "where they are collated"),
    (NoGradientError("a.b"), ["'a.b'", "torch.no_grad()"], "use_reentrant=False"),
    (LossShapeError((), 4), ["4 samples", "shape []"], "reduction='none'"),
    (NotCompressibleError("Net", "SVD", "encoder"), ["Net", "SVD", "'encoder'"], "docs/own_module.md"),
    (NotSavableError("Net", "its class is none"), ["Net", "its class is none"], "compact_(model)"),
    (UntoldChangeError("Net", "it lacks 'x'"), ["Net", "it lacks 'x'"], "model.config"),
    (SeveralDevicesError("Net", ["cpu", "cuda:0"]), ["Net", "cpu, cuda:0"], "model.to("),
    (TeacherError.unlearned("m"), ["'self'", "'m'", "freshly"], "Fine-tune the dense model first"),
    (TeacherError.of_another_task("m", "BertForMaskedLM"), ["'m'", "BertForMaskedLM"], "give its checkpoint or folder"),
    (TeacherError.factorised("m"), ["'self'", "'m'", "factorised already"], "checkpoint of the dense model"),
    (TeacherError.predicts_otherwise("m", "a", "b"), ["'m'", "predicts a", "ask for b"], "fine-tune one on these data"),
    (TeacherError.reads_otherwise("m", "it has 3 tokens"), ["'m'", "it has 3 tokens"], "model.init_args.pretrained"),
    (TeacherError.reads_less("m", 8, 9), ["'m'", "reads 8 tokens", "up to 9"], "max_length: 8"),
    (TeacherError.built_otherwise("m", "3 blocks", "2 blocks"), ["'m'", "3 blocks", "2 blocks"], "hidden_states: 0"),
    (ShapeError("weight", (3,), "[out, in]"), ["weight", "(3,)"], "[out, in]"),
    (RankError(9, 4), ["9", "4"], "smaller rank"),
    (RankError(9, 4, "a.b"), ["9", "'a.b'", "4"], "smaller rank"),
    (LatencyTableError("t.json", "it is empty"), ["'t.json'", "it is empty", "benchmark"], "measure one"),
    (BudgetUnitError("parameters", "ns"), ["parameters", "ns"], "keep_ratio"),
    (RatioError("keep_ratio", 1.5), ["keep_ratio=1.5", "0 < keep_ratio <= 1"], "*kept*"),
    (RangeError("damping", -1.0, "0 <= damping"), ["damping=-1.0", "0 <= damping"], "Change damping"),
    (
        MonitorModeError("ModelCheckpoint", "val/score", "max", "min", "text"),
        ["'val/score'", "'max'", "'text'"],
        "'min'",
    ),
    (NoTrainingStepError("SVD"), ["SVD", "without a single optimizer step"], "compress"),
    (AlreadyCompactedError("RankDyna", 9000, 4000, "FLOPs"), ["RankDyna", "9,000 FLOPs", "4,000"], "ckpt_path"),
    (UnsupportedCallbackError("Pruning", "it prunes", "Remove it."), ["Pruning", "it prunes"], "Remove it"),
    (HiddenOptimizerStateError("Lookahead"), ["Lookahead"], "Set model.init_args.optimizer"),
    (NothingToScoreError(), ["trainer.limit_val_batches=0"], "remove the setting"),
    (BudgetAboveStartError(90, 50, 0.1), ["budget of 90", "the 50", "start_ratio=0.1"], "Lower keep_ratio"),
    (BudgetNotReachedError(9000, 4000, 6, 24), ["after 6 of 24", "9,000", "4,000"], "--ckpt_path"),
    (FrozenFactorsError(["a.b"]), ["1 targeted", "'a.b'", "requires_grad=False"], "targets.exclude"),
    (ScheduleError("a run of 1 step", "is too short", "longer runs"), ["a run of 1 step", "too short"], "max_epochs"),
    (OptimizerStateError("Odd", "rows", "[3]"), ["Odd", "'rows'", "[3]"], "model.init_args.optimizer"),
    (UnknownOptimizerStateError("Odd", "z"), ["Odd", "'z'", "FirstOrder"], "model.init_args.optimizer"),
    (OutputNotWritableError("/x", "no"), ["'/x'", "(no)"], "--output"),
    (NonFiniteError("the weight", 3, "a.b"), ["the weight", "'a.b'", "3 NaN"], "targets.exclude"),
    (NonFiniteError("the loss"), ["the loss contains NaN or Inf"], "targets.exclude"),
    (
        NonFiniteError("the loss", 2, first="the input of 'a'"),
        ["2 NaN", "first seen in the input of 'a'"],
        "Start from",
    ),
    (
        NonFiniteScoreError("the loss of a test batch", "the output of module 'a'"),
        ["a test batch", "first seen in"],
        "--trainer.precision",
    ),
    (LabelsError("Pairs", "no labels", "sampled"), ["Pairs", "no labels"], "labels to 'sampled' to draw them"),
    (LabelsError("Pairs", "no labels"), ["Pairs", "no labels"], "Give data that have labels"),
    (ImportanceError("importance", -1.0, (0, 2)), ["importance", "-1.0", "(0, 2)"], "0 upwards"),
    (BudgetError(0.01, 5000, 100000), ["keep_ratio=0.01", "5,000", "100,000", "0.050000"], "fewer layers"),
    (NoTargetError("Bert", ["x"], ["y"], ["a.b"], 0), ["Bert", "['x']", "['y']", "'a.b'"], "targets.include"),
    (NoTargetError("Bert", None, [], [], 0), ["Bert", "default"], "targets.include"),
    (NoTargetError("Bert", None, [], [], 7), ["Bert", "7 layers"], "NoCompression"),
    (TiedWeightError("a", "b"), ["'a'", "'b'"], "targets.exclude"),
    (VocabularyError("Bert", "it has none"), ["Bert", "it has none"], "targets.embeddings"),
    (
        VocabularySizeError("t", 1200, "m", 1000),
        ["'t' has 1,200", "'m' embeddings for 1,000"],
        "data.init_args.tokenizer",
    ),
    (OverrideError("*.x", "matches nothing", ["a"]), ["'*.x'", "matches nothing", "'a'"], "init_args.overrides"),
    (ModelFolderError("/m", "config.json", ["b", "a"]), ["'/m'", "config.json", "'a', 'b'"], "save_pretrained"),
    (ModelFolderError("/m", "config.json", []), ["nothing"], "save_pretrained"),
    (ModelFolderError("/m", "weights", ["model.onnx"]), ["'/m'", "onnxruntime alone"], "--engines onnxruntime-int8"),
    (ModelFolderError("/m", "weights", ["model_int8.safetensors"]), ["'/m'", "in int8"], "model.init_args.init_from"),
    (PackageModelError("pkg://x", "gone"), ["'pkg://x'", "gone"], "pip install"),
    (HubUnreachableError("o/m", "timeout"), ["'o/m'", "timeout"], "local folder"),
    (CheckpointMismatchError("x.ckpt", "bad"), ["x.ckpt", "bad"], "init_args.pretrained"),
    (CheckpointMismatchError.keys("x.ckpt", ["m"], ["u"]), ["missing 'm'; unexpected 'u'"], "init_args.pretrained"),
    (LayoutVersionError(7, (1, 2)), ["7", "versions 1 and 2"], "upgrade"),
    (UnknownFormError("woven", ["low_rank"], "a.b", "x.ckpt"), ["woven", "a.b", "low_rank"], "Import the module"),
    (FormSpecError({"form": "low_rank"}, "the whole number 'rank'"), ["low_rank", "'rank'"], "spec()"),
    (HeadError("Bert", "it has no bias"), ["Bert", "no bias"], "recalibration"),
    (UnsupportedModelError("o/vit", "vit", "AutoModelForMaskedLM", False), ["'o/vit'", "'vit'"], "pretrained"),
    (UnsupportedModelError("o/m", "t5", "AutoModelForCausalLM", True), ["'o/m'", "'t5'", "Llama"], "pretrained"),
    (NotADecoderError("o/m", "bert"), ["'o/m'", "'bert', an encoder"], "MaskedLM"),
    (NotALanguageModelError("m", "it is an encoder"), ["'m'", "it is an encoder"], "Check --models"),
    (TextStartError("t"), ["'t'", "neither a bos nor an eos"], "--tokenizer"),
    (UnknownHarnessTaskError("a", ["b"], 3, "f", " (x)"), ["'a'", "3 names", "'f' (x)", "'b'"], "lm_eval ls tasks"),
    (TaskDataError("a", "no such file", False), ["'a'", "no such file"], "--include_path"),
    (TaskDataError("a", "unreachable", True), ["'a'", "HF_DATASETS_OFFLINE is set"], "set HF_HUB_OFFLINE=1"),
    (TaskUnusableError("a", "KeyError: 'b'"), ["'a'", "KeyError: 'b'"], "leave it out of --tasks"),
    (MissingTokenError("o/m", "eos"), ["'o/m'", "no eos token", "between the documents"], "data.init_args.separator"),
    (WindowError("test", 300, 512), ["the test split has 300 tokens", "512"], "lower data.init_args.window"),
    (MemoryBoundError(0.5, "a.b", 2**30), ["0.5", "'a.b'", "1 GiB"], "exclude the layer"),
    (ConstructionError("no such argument", "AdamW", "Check it."), ["AdamW", "no such argument"], "Check it."),
    (InterpolationError("a.b", "${X}/c", "${X}"), ["a.b", "'${X}/c'"], "command line"),
    (OptimizerArgumentsError("lr is -1"), ["lr is -1"], "optimizer"),
    (AllocationError("Global", "SVD", "it looks away"), ["Global", "SVD", "it looks away"], "Uniform"),
    (EmbeddingsError("FWSVD", "it sees none"), ["FWSVD", "it sees none"], "embeddings to false"),
    (NonFiniteWeightsError("a.ckpt", "x.weight"), ["'a.ckpt'", "'x.weight'", "NaN or Inf"], "earlier checkpoint"),
    (EngineError("compile", "cpu", "no g++", "a compiler"), ["compile", "cpu", "no g++"], "leave compile out"),
    (NotOfTextsAloneError("ViTModel", "no vocab_size"), ["ViTModel", "no vocab_size"], "leave it out of --models"),
    (
        BlocksMismatchError("out.blocks", "keep_ratio", "0.5", "0.4"),
        ["'out.blocks'", "keep_ratio=0.5", "0.4"],
        "give another --output",
    ),
    (BlocksMismatchError("out.blocks", "data", "a", "b"), ["'out.blocks'", "other calibration samples"], "Start it as"),
    (BenchmarkResumeError("out", "threads differ"), ["'out'", "threads differ"], "new --output"),
    (NotACheckpointError("p", "empty"), ["'p'", "empty"], "*.ckpt"),
    (DamagedWeightsError("/m/w", "ab" * 32, "cd" * 32, "SUMS"), ["'/m/w'", "abab", "SUMS beside it", "cdcd"], "Copy"),
    (DamagedWeightsError("/m/w", "ab" * 32, None, "SUMS"), ["'/m/w'", "does not list it"], "remove SUMS"),
    (OnnxExportError("Bert", "a branch"), ["Bert", "(a branch)", "DistilBERT"], "--format factorised"),
    (
        QuantizationError("Bert", "its logits are far away"),
        ["Bert", "its logits are far away", "nothing was written"],
        "Leave --quantize out",
    ),
    (
        OnnxMismatchError("Bert", "it differs by 2"),
        ["Bert", "it differs by 2", "nothing was written"],
        "--format factorised",
    ),
    (QuantizedModelError("small", "fit"), ["'small' is in int8", "fit needs the weights"], "exported from"),
    (
        ScoreDropError("f1", 0.85, 0.8, 0.05, 0.01, 1408),
        ["0.8000", "0.8500", "f1, 1,408 samples", "0.0500", "max_drop=0.01", "nothing was written"],
        "Raise --max_drop",
    ),
    (OutputExistsError("out"), ["'out'"], "--output"),
    (StrategyPlacementError("SVD"), ["SVD", "trainer.callbacks"], "model.init_args.strategy"),
    (UnsupportedParallelismError("SVD", "FSDP", "it is old"), ["SVD", "FSDP: it is old"], "'ddp'"),
    (UnevenValidationError(1, 2), ["process 1 of 2"], "give more validation data"),
    (StartMethodError("SVD", "fork"), ["SVD", "'fork'", "ddp_notebook"], "trainer.devices to 1"),
    (ProcessFailedError(1, "NonFiniteError: bad."), ["process 1", "NonFiniteError: bad. This"], "start the run again"),
    (RunFolderInUseError("logs/a"), ["'logs/a'"], "--trainer.logger.init_args.version"),
    (CalibrationError("FWSVD", "none"), ["FWSVD", "none"], "datamodule="),
    (FewSamplesError("FWSVD", 1, 2), ["FWSVD", "1 for 2"], "calibration.max_samples to 2 or more"),
    (ResumeMismatchError("2 layers"), ["2 layers"], "config.yaml"),
    (ResumeMismatchError.of_teacher("a there"), ["model.init_args.distillation", "a there"], "config.yaml"),
    (TargetKindError("MaskedLM", ("a", "b"), "MRPC", "c"), ["'MRPC'", "MaskedLM", "a and b", "c"], "Choose"),
    (
        TargetKindError("CausalLM", ("causal_lm",), "TextCorpus", "masked_lm"),
        ["'TextCorpus'"],
        "the data CausalText for",
    ),
    (MissingArgumentError("it", "Set x."), ["it is missing"], "Set x."),
    (MissingPackagesError("x", ["a", "b"], "more"), ["x needs", "'a', 'b'", "'more'"], 'install "lowrank-pl[more]"'),
    (NotFactorisedError("SVD", ["a", "b"]), ["SVD", "2", "'a'"], "report"),
    (OptimizerCoverageError(["a", "b"]), ["2", "'a'"], "configure_optimizers"),
    (NothingToCompressError("NoCompression"), ["NoCompression"], "KroneckerSVD, FWSVD or SVD"),
    (ExclusiveArgumentsError(["a", "b"], ["a", "b"], "x"), ["a and b are given together"], "--x.a=null"),
    (ExclusiveArgumentsError(["a", "b"], [], "x"), ["none of a, b is given"], "x.a"),
]


@pytest.mark.parametrize(("error", "given", "remedy"), CASES, ids=lambda v: type(v).__name__)
def test_messages_quote_what_was_given_and_say_what_to_do(error: LowRankError, given: list[str], remedy: str) -> None:
    message = str(error)
    for part in [*given, remedy]:
        assert part in message, f"{part!r} is not in {message!r}"
    assert message.endswith(".")
    assert "  " not in message


def every_error(module: str) -> list[type[Exception]]:
    names = vars(importlib.import_module(module)).values()
    return [v for v in names if inspect.isclass(v) and v.__module__ == module and issubclass(v, Exception)]


def test_every_error_of_the_package_is_a_value_error_with_a_docstring() -> None:
    found = [
        error
        for info in pkgutil.iter_modules(lowrank_pl.errors.__path__, "lowrank_pl.errors.")
        for error in every_error(info.name)
    ]
    assert len(found) > 25
    for error in found:
        assert issubclass(error, LowRankError), error
        assert issubclass(error, ValueError), error
        assert error.__doc__, error


OF_DATA = {"data", "data_files", "labels"}  # tests/data sees them raised
MODULES = {info.name for info in pkgutil.iter_modules(lowrank_pl.errors.__path__)} - {"base", *OF_DATA}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_message_is_among_the_cases(module: str) -> None:
    covered = {type(error) for error, _, _ in CASES}
    assert set(every_error(f"lowrank_pl.errors.{module}")) <= covered


def test_long_lists_are_cut() -> None:
    message = str(CheckpointMismatchError.keys("x", [f"key{i}" for i in range(9)], []))
    assert "'key2', … (9 in all)" in message
    assert "key3" not in message
