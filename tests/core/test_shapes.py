import pytest

from lowrank_pl.core import LinearShape
from lowrank_pl.errors.numerics import RankError


def test_bert_base_costs_of_a_rank() -> None:
    assert LinearShape(768, 768).params_per_rank == 1536
    assert LinearShape(3072, 768).params_per_rank == 3840
    assert LinearShape(768, 3072).params_per_rank == 3840


def test_bert_base_break_even() -> None:
    assert LinearShape(768, 768).break_even_rank == 384
    assert LinearShape(3072, 768).break_even_rank == 615  # 614.4, rounded up
    assert LinearShape(2, 768).break_even_rank == 2  # a classification head


@pytest.mark.parametrize("m", [1, 2, 3, 5, 8, 13])
@pytest.mark.parametrize("n", [1, 2, 4, 7, 13])
def test_break_even_is_the_first_rank_that_saves_nothing(m: int, n: int) -> None:
    shape = LinearShape(m, n)
    rank = shape.break_even_rank
    assert rank * (m + n) >= shape.dense_params
    assert (rank - 1) * (m + n) < shape.dense_params
    assert 1 <= rank <= shape.full_rank


def test_bert_base_encoder_at_rank_253() -> None:
    attention, up, down = LinearShape(768, 768), LinearShape(3072, 768), LinearShape(768, 3072)
    layer = [attention] * 4 + [up, down]
    assert 12 * sum(shape.dense_params for shape in layer) == 84_934_656
    assert 12 * sum(shape.factored_params(253) for shape in layer) == 41_969_664
    assert int(0.33 * attention.full_rank) == int(0.33 * up.full_rank) == 253


def test_full_rank_is_the_smaller_side() -> None:
    assert LinearShape(3072, 768).full_rank == LinearShape(768, 3072).full_rank == 768


@pytest.mark.parametrize("rank", [1, 3])
def test_allowed_ranks_pass(rank: int) -> None:
    LinearShape(3, 5).check_rank(rank)
    assert LinearShape(3, 5).factored_params(rank) == 8 * rank


@pytest.mark.parametrize("rank", [0, -2, 4])
def test_impossible_ranks_name_rank_bound_and_layer(rank: int) -> None:
    with pytest.raises(RankError) as caught:
        LinearShape(3, 5).check_rank(rank, "encoder.0.query")
    for part in (f"rank {rank} ", "'encoder.0.query'", "min(out, in) = 3"):
        assert part in str(caught.value)
    with pytest.raises(RankError, match=rf"rank {rank} is impossible"):
        LinearShape(3, 5).factored_params(rank)
