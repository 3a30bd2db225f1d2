"""What may be kept, said in three ways."""

import re
from fractions import Fraction
from typing import Any

import pytest

from lowrank_pl.allocation import Budget, Cost
from lowrank_pl.core import LinearShape
from lowrank_pl.errors.arguments import ExclusiveArgumentsError
from lowrank_pl.errors.numerics import BudgetError, RangeError, RatioError

# Dense 2,500 + 625 + 375 = 3,500 parameters; one group in each costs 100 + 50 + 40 = 190.
SHAPES = {"a": LinearShape(50, 50), "b": LinearShape(25, 25), "c": LinearShape(15, 25)}
UNTARGETED = 1_000


@pytest.mark.parametrize("share", [Fraction(n, 100) for n in (8, 29, 33, 50, 57, 58, 75, 100)])
def test_the_three_ways_to_say_it_agree(share: Fraction) -> None:
    dense = sum(shape.dense_params for shape in SHAPES.values())
    wanted = int(share * dense)
    for budget in (
        Budget(keep_ratio=float(share)),
        Budget(parameters=wanted),
        Budget(model_parameters=wanted + UNTARGETED),
    ):
        assert budget.resolve(SHAPES, UNTARGETED) == wanted


@pytest.mark.parametrize("hundredths", range(8, 101))
def test_a_ratio_counts_as_written_and_is_never_exceeded(hundredths: int) -> None:
    # In floating point 0.29 · 100 is 28.999999999999996.
    shapes = {"a": LinearShape(100, 100)}
    assert Budget(keep_ratio=hundredths / 100).resolve(shapes, 0) == 100 * hundredths
    odd = {"a": LinearShape(101, 97)}
    assert Budget(keep_ratio=hundredths / 100).resolve(odd, 0) == 101 * 97 * hundredths // 100


def test_bert_base_to_the_size_in_the_papers() -> None:
    layer = {
        **{f"attention.{i}": LinearShape(768, 768) for i in range(4)},
        "up": LinearShape(3072, 768),
        "down": LinearShape(768, 3072),
    }
    shapes = {f"{block}.{name}": shape for block in range(12) for name, shape in layer.items()}
    untargeted = 109_482_240 - 84_934_656
    # 66.5 million in all is what rank 253 everywhere comes to.
    assert Budget(model_parameters=untargeted + 41_969_664).resolve(shapes, untargeted) == 41_969_664
    assert Budget(keep_ratio=1.0).resolve(shapes, untargeted) == 84_934_656
    assert Budget(keep_ratio=0.5).resolve(shapes, untargeted) == 42_467_328


def test_only_the_size_of_the_model_counts_what_is_not_targeted() -> None:
    for budget in (Budget(keep_ratio=0.5), Budget(parameters=1_600)):
        assert budget.resolve(SHAPES, 0) == budget.resolve(SHAPES, 10**9)
    budget = Budget(model_parameters=2_000)
    assert budget.resolve(SHAPES, 1_000) - budget.resolve(SHAPES, 1_100) == 100


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "none of keep_ratio"),
        ({"keep_ratio": 0.5, "parameters": 100}, "keep_ratio and parameters are given together"),
        ({"keep_ratio": 0.5, "model_parameters": 100}, "keep_ratio and model_parameters are"),
        ({"parameters": 90, "model_parameters": 100}, "parameters and model_parameters are"),
        (
            {"keep_ratio": 0.5, "parameters": 9, "model_parameters": 100},
            "keep_ratio and parameters and",
        ),
    ],
)
def test_exactly_one_is_given(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ExclusiveArgumentsError, match=said):
        Budget(**given)


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.0001, 33.0, float("nan"), float("inf")])
def test_a_ratio_out_of_range_is_refused(ratio: float) -> None:
    with pytest.raises(RatioError) as caught:
        Budget(keep_ratio=ratio)
    assert f"keep_ratio={ratio!r} is out of range: allowed is 0 < keep_ratio <= 1" in str(caught.value)


@pytest.mark.parametrize("name", ["parameters", "model_parameters"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_number_below_one_is_refused(name: str, value: int) -> None:
    with pytest.raises(RangeError, match=rf"^{name}={value} is out of range: allowed is a whole number from 1"):
        Budget(**{name: value})


def test_one_group_in_each_layer_is_the_least() -> None:
    assert Budget(parameters=190).resolve(SHAPES, UNTARGETED) == 190
    assert Budget(model_parameters=1_190).resolve(SHAPES, UNTARGETED) == 190
    assert Budget(keep_ratio=190 / 3_500).resolve(SHAPES, UNTARGETED) == 190


@pytest.mark.parametrize(
    ("given", "said"),
    [({"keep_ratio": 0.05}, "keep_ratio=0.05"), ({"parameters": 189}, "parameters=189")],
)
def test_less_is_refused_with_the_floor(given: dict[str, Any], said: str) -> None:
    with pytest.raises(BudgetError) as caught:
        Budget(**given).resolve(SHAPES, UNTARGETED)
    for part in (said, "cannot be reached", "190 of 3,500 parameters", f"keep_ratio of {190 / 3500:.6f}"):
        assert part in str(caught.value)
    assert "not targeted" not in str(caught.value)


@pytest.mark.parametrize("asked", [1_189, 1_000, 999, 1])
def test_a_model_too_small_is_refused_with_what_is_not_targeted(asked: int) -> None:
    with pytest.raises(BudgetError) as caught:
        Budget(model_parameters=asked).resolve(SHAPES, UNTARGETED)
    for part in (f"model_parameters={asked}", "190 of 3,500", "1,000 more parameters of the model are not targeted"):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["keep_ratio", "parameters", "model_parameters"])
def test_the_least_that_a_refusal_names_is_accepted(name: str) -> None:
    shapes = {"a": LinearShape(7, 11), "b": LinearShape(13, 3)}
    with pytest.raises(BudgetError) as caught:
        _budget(name, 0.01 if name == "keep_ratio" else 1).resolve(shapes, 100)
    (least,) = re.findall(rf"Ask for {name}=([\d.]+) or more", str(caught.value))
    value = float(least) if name == "keep_ratio" else int(least)
    assert _budget(name, value).resolve(shapes, 100) == 18 + 16


def _budget(name: str, value: Any) -> Budget:
    return Budget(**{name: value})


def test_the_floor_is_that_of_the_form_the_layers_end_in() -> None:
    """Two factors of a 1 x 9 weight have 10 numbers, the weight has 9: it is the floor only where dense is allowed."""
    shapes = {"head": LinearShape(1, 9), "body": LinearShape(10, 10)}
    assert Budget(parameters=30).resolve(shapes, 0) == 30
    assert Budget(parameters=29).resolve(shapes, 0, Cost(allow_dense=True)) == 29
    with pytest.raises(BudgetError, match="30 of 109"):
        Budget(parameters=29).resolve(shapes, 0)
    with pytest.raises(BudgetError, match=r"10 of 9 parameters.*Set allow_dense"):
        Budget(keep_ratio=1.0).resolve({"head": shapes["head"]}, 0)


def test_the_lowest_ranks_of_bounds_are_the_floor() -> None:
    lowest = {"a": 3, "b": 1, "c": 2}
    assert Budget(parameters=430).resolve(SHAPES, 0, lowest=lowest) == 430
    with pytest.raises(BudgetError, match=r"bounds, e\.g\. rank 3 in 'a', already cost 430 .*=430 or more, lower the"):
        Budget(parameters=429).resolve(SHAPES, 0, lowest=lowest)


@pytest.mark.parametrize("given", [{"parameters": 3_501}, {"model_parameters": 4_501}])
def test_more_than_the_dense_model_has_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(RangeError, match=r"at most [34],500, what the"):
        Budget(**given).resolve(SHAPES, UNTARGETED)
