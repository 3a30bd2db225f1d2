import pytest
import torch

from lowrank_pl.core import LinearShape
from lowrank_pl.core.checks import check_finite, check_importance, check_weight
from lowrank_pl.errors.numerics import ImportanceError, NonFiniteError, RankError, ShapeError


def test_a_good_weight_gives_its_shape() -> None:
    assert check_weight(torch.ones(3, 5)) == LinearShape(3, 5)
    assert check_weight(torch.ones(3, 5), 3) == LinearShape(3, 5)


def test_a_rank_is_checked_only_when_given() -> None:
    with pytest.raises(RankError, match="rank 4 is impossible"):
        check_weight(torch.ones(3, 5), 4)


def test_finite_names_what_how_many_and_which_layer() -> None:
    check_finite("the weight", torch.ones(3))
    with pytest.raises(NonFiniteError, match=r"the weight of layer 'a\.b' contains 1 NaN or Inf entries"):
        check_finite("the weight", torch.tensor([1.0, float("nan")]), "a.b")


def test_importance_of_the_right_shape_passes_with_zeros() -> None:
    check_importance("input_importance", torch.tensor([0.0, 1.0]), (2,))


def test_importance_of_another_shape_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"input_importance has shape \(3,\), expected \[2\]"):
        check_importance("input_importance", torch.ones(3), (2,))
    with pytest.raises(ShapeError, match=r"importance has shape \(2,\), expected \[2, 3\]"):
        check_importance("importance", torch.ones(2), (2, 3))


def test_negative_importance_is_refused_with_value_and_position() -> None:
    importance = torch.tensor([[1.0, 2.0], [3.0, -0.5]])
    with pytest.raises(ImportanceError, match=r"negative entry -0\.5 at \(1, 1\)"):
        check_importance("importance", importance, (2, 2))


def test_non_finite_importance_is_refused() -> None:
    with pytest.raises(NonFiniteError, match="output_importance contains 1 NaN or Inf entries"):
        check_importance("output_importance", torch.tensor([1.0, float("inf")]), (2,))


def test_a_tensor_without_values_holds_none_that_is_not_finite() -> None:
    check_finite("the weight", torch.empty(2, 3, device="meta"))
