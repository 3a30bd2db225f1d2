"""Layers that end in the pivoted form: the same functions, ranks by what they cost there, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging

from lowrank_pl.allocation import Flops, Global, Latency, LayerOverride, Parameters
from lowrank_pl.core import LinearShape
from lowrank_pl.errors.numerics import FormCostError, RangeError
from lowrank_pl.errors.run import ResumeMismatchError
from lowrank_pl.export import export, from_pretrained
from lowrank_pl.importance import FirstOrder
from lowrank_pl.monitoring import ReportWriter
from lowrank_pl.nn import FinalForm, PivotedLinear, forms_in, forms_in_training
from lowrank_pl.strategies import FWSVD, SVD, CompressionStrategy, KroneckerSVD, RankDyna, Recalibration
from lowrank_pl.strategies.any_module import compress
from lowrank_pl.surgery import densify_
from lowrank_pl.trainer.inspection import inspect_model
from tests.support.runs import last_checkpoint, make_task, make_trainer
from tests.support.synthetic import SyntheticData


def compressed(pretrained: str, folder: Path, strategy: CompressionStrategy) -> Any:
    """A task after `compress`, with its logits on the validation data."""
    task = make_task(pretrained, strategy)
    task.build(SyntheticData().target)
    make_trainer(folder).compress(task, SyntheticData(), str(folder / "out"))
    return task


@torch.no_grad()
def logits(task: Any) -> torch.Tensor:
    batch = next(iter(SyntheticData().val_dataloader()))
    found: torch.Tensor = task.encoder.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits
    return found


def test_refit_and_head_see_the_same_model_in_both_forms(tiny_bert: str, tmp_path: Path) -> None:
    """At equal ranks nothing but rounding may differ, whatever is fitted before and after rows are chosen."""
    found = {}
    for form in ("low_rank", "pivoted"):
        made = KroneckerSVD(
            keep_ratio=0.9, overrides=[LayerOverride("*", rank=12)], recalibration=Recalibration(), form=form
        )
        found[form] = compressed(tiny_bert, tmp_path / form, made)
    one, other = forms_in(found["low_rank"].encoder), forms_in(found["pivoted"].encoder)
    assert {type(layer) for layer in other.values()} == {PivotedLinear}
    assert one.keys() == other.keys()
    for name, layer in one.items():
        torch.testing.assert_close(other[name].product(), layer.product(), atol=1e-5, rtol=0)
        assert layer.bias is not None
        torch.testing.assert_close(other[name].bias, layer.bias, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(found["pivoted"]), logits(found["low_rank"]), atol=1e-5, rtol=0)
    report = json.loads((tmp_path / "pivoted" / "out" / "report.json").read_text())
    assert {layer["kind"] for layer in report["layers"]} == {"pivoted"}
    assert report["options"]["form"] == "pivoted"
    assert report["parameters"]["targeted_kept"] == sum(12 * (sum(s) - 12) for s in [(32, 32)] * 8 + [(64, 32)] * 4)


@pytest.mark.parametrize("cost", [Parameters(), Flops()])
def test_every_rank_below_the_full_one_is_cheaper_than_dense(tiny_bert: str, cost: Any) -> None:
    task = make_task(tiny_bert)
    task.build(SyntheticData().target)
    ranks = {}
    for form in ("low_rank", "pivoted"):
        plan = SVD(keep_ratio=0.8, cost=cost, form=form).plan(task.encoder)
        ranks[form] = plan.ranks
        assert 0.75 < plan.kept / plan.dense <= 0.8
    square, wide = (next(n for n, s in plan.shapes.items() if s == LinearShape(m, 32)) for m in (32, 64))
    assert (ranks["low_rank"][square], ranks["low_rank"][wide]) == (12, 17)
    assert (ranks["pivoted"][square], ranks["pivoted"][wide]) == (17, 22)  # above break-even, 16 of the square ones
    shown = inspect_model(task.encoder, SVD(keep_ratio=0.8, form="pivoted"))
    first = next(line.split() for line in shown.splitlines() if line.startswith(square))
    assert first[1:8] == ["32", "32", "1,024", "63", "32", "17", "799"]


def test_global_ranks_pay_what_they_cost(tiny_bert: str, tmp_path: Path) -> None:
    task = compressed(tiny_bert, tmp_path, FWSVD(keep_ratio=0.6, allocation=Global(), form="pivoted"))
    record = task.compression
    assert 0.58 < record.keep_ratio <= 0.6
    assert record.cost.ratio == record.keep_ratio
    for name, layer in forms_in(task.encoder).items():
        told = next(one for one in record.layers if one.name == name)
        assert (told.kind, told.rank, told.parameters) == (
            "pivoted",
            layer.rank,
            layer.rank * (sum_of(layer) - layer.rank),
        )


def sum_of(layer: Any) -> int:
    return int(layer.out_features + layer.in_features)


@pytest.mark.parametrize("score", [None, FirstOrder])
def test_rankdyna_ends_in_it_within_its_budget(tiny_bert: str, tmp_path: Path, score: Any) -> None:
    strategy = RankDyna(keep_ratio=0.6, sensitivity=score and score(), form="pivoted")
    task = make_task(tiny_bert, strategy)
    trainer = make_trainer(tmp_path, max_epochs=2, callbacks=[ReportWriter()])
    trainer.fit(task, datamodule=SyntheticData())
    layers = forms_in(task.encoder)
    assert layers
    assert {type(layer) for layer in layers.values()} == {PivotedLinear}
    record = task.compression
    assert 0.55 < record.keep_ratio <= 0.6
    assert {r.name: (r.rank, r.parameters) for r in record.layers if r.kind == "pivoted"} == {
        name: (layer.rank, layer.parameters_of(layer.spec(), layer.shape)) for name, layer in layers.items()
    }
    # What was saved at the last step is still in the form of training; whatever reads it ends in the same form.
    loaded = from_pretrained(str(export(last_checkpoint(trainer), str(tmp_path / "out"))))
    assert {name: layer.spec() for name, layer in forms_in(loaded).items()} == {n: m.spec() for n, m in layers.items()}
    expected = logits(task)
    task.encoder = loaded
    torch.testing.assert_close(logits(task), expected, atol=1e-5, rtol=0)
    task.encoder = densify_(loaded)
    torch.testing.assert_close(logits(task), expected, atol=1e-5, rtol=0)


def test_an_averaged_copy_has_the_rows_of_the_model(tiny_bert: str, tmp_path: Path) -> None:
    """Lightning copies the average's parameters into the model at the end, and no buffers: they have to fit them."""
    strategy = RankDyna(keep_ratio=0.4, form="pivoted")
    task = make_task(tiny_bert, strategy)
    averaging = StochasticWeightAveraging(0.01, swa_epoch_start=1, annealing_epochs=1)
    found: list[dict[str, torch.Tensor]] = []

    trainer = make_trainer(tmp_path, max_epochs=4, callbacks=[averaging])
    finalize = strategy.finalize

    def looking(encoder: Any, like: Any = None) -> Any:
        found.append({name: layer.product().detach().clone() for name, layer in forms_in_training(encoder).items()})
        return finalize(encoder, like)

    strategy.finalize = looking  # type: ignore[method-assign]
    trainer.fit(task, datamodule=SyntheticData())
    assert len(found) == 2  # the model, then its average
    for name, layer in forms_in(task.encoder).items():
        torch.testing.assert_close(layer.product(), found[1][name], atol=1e-4, rtol=0)


def test_what_is_refused(tiny_bert: str, tmp_path: Path) -> None:
    with pytest.raises(RangeError, match="form='elastic' is out of range: allowed is 'low_rank' or 'pivoted'"):
        SVD(keep_ratio=0.5, form="elastic")  # type: ignore[arg-type]
    entry = {"out": 8, "in": 8, "dense_nanoseconds": 90, "ranks": [2, 4], "nanoseconds": [30, 50]}
    tables: dict[FinalForm, Path] = {}
    forms: list[FinalForm] = ["low_rank", "pivoted"]
    for form in forms:
        tables[form] = tmp_path / f"{form}.json"
        tables[form].write_text(json.dumps({"version": 1, "form": form, "shapes": [entry]}))
    for form, other in zip(forms, reversed(forms), strict=True):
        for made in (SVD, RankDyna):
            with pytest.raises(FormCostError, match=f"in the form '{other}' cost, and the strategy's form is '{form}'"):
                made(keep_ratio=0.5, cost=Latency(str(tables[other])), form=form)
        assert SVD(keep_ratio=0.5, cost=Latency(str(tables[form])), form=form).measure.form.name == form
    strategy = SVD(keep_ratio=0.5, form="pivoted")
    with pytest.raises(ResumeMismatchError, match="form='low_rank' there, form='pivoted' here"):
        strategy.load_state_dict({"written": True, "options": {"form": "low_rank"}})


def test_a_module_of_ones_own_is_brought_to_it() -> None:
    model = torch.nn.Sequential()
    model.blocks = torch.nn.ModuleList([torch.nn.Linear(12, 10), torch.nn.Linear(10, 12)])
    record = compress(model, None, None, SVD(keep_ratio=0.9, form="pivoted"))
    assert [type(layer) for layer in model.blocks] == [PivotedLinear, PivotedLinear]
    assert record.keep_ratio <= 0.9
