import math
from fractions import Fraction

import pytest

from lowrank_pl.allocation import Allocation, LayerOverride, Parameters, uniform_ranks
from lowrank_pl.allocation.uniform import floor_cost
from lowrank_pl.core import LinearShape
from lowrank_pl.errors.arguments import ExclusiveArgumentsError
from lowrank_pl.errors.numerics import BudgetError, RangeError, RankError, RatioError
from lowrank_pl.errors.targets import OverrideError

BERT_LAYER = {
    "layer.0.attention.query": LinearShape(768, 768),
    "layer.0.attention.key": LinearShape(768, 768),
    "layer.0.intermediate": LinearShape(3072, 768),
    "layer.0.output": LinearShape(768, 3072),
}
MIXED = {
    "layer.0.up": LinearShape(64, 16),
    "layer.0.down": LinearShape(16, 64),
    "layer.1.square": LinearShape(24, 24),
    "layer.1.narrow": LinearShape(5, 40),
    "layer.1.tiny": LinearShape(2, 7),
}
RATIOS = ["0.01", "0.05", "0.1", "0.123", "0.2", "0.25", "0.33", "0.5", "0.6", "0.75", "0.9", "0.99", "0.999"]


@pytest.mark.parametrize("ratio", RATIOS)
def test_every_layer_gets_the_largest_rank_its_share_pays_for(ratio: str) -> None:
    allocation = uniform_ranks(BERT_LAYER, keep_ratio=float(ratio))
    for name, shape in BERT_LAYER.items():
        rank = allocation.ranks[name]
        assert rank is not None
        share = Fraction(ratio) * shape.dense_params
        assert rank * shape.params_per_rank <= share
        assert (rank + 1) * shape.params_per_rank > share


@pytest.mark.parametrize("ratio", ["0.3", "0.3125", *RATIOS[4:], "1.0"])
@pytest.mark.parametrize("multiple_of", [1, 4])
def test_what_is_kept_never_exceeds_the_ratio(ratio: str, multiple_of: int) -> None:
    allocation = uniform_ranks(MIXED, keep_ratio=float(ratio), multiple_of=multiple_of)
    assert allocation.kept <= Fraction(ratio) * allocation.dense
    assert list(allocation.ranks) == list(MIXED)
    for name, rank in allocation.ranks.items():
        if rank is not None:
            assert 1 <= rank < MIXED[name].break_even_rank


@pytest.mark.parametrize("hundredths", range(12, 101))
def test_every_hundredth_is_kept_to(hundredths: int) -> None:
    allocation = uniform_ranks(MIXED, keep_ratio=hundredths / 100)
    assert allocation.kept <= Fraction(hundredths, 100) * allocation.dense


def test_a_ratio_that_pays_exactly_for_a_rank_gets_it() -> None:
    # 10 / 3 ranks of a 20x20 layer are 400 / 3 parameters; the ratio 0.1 pays for exactly one.
    assert uniform_ranks({"a": LinearShape(20, 20)}, keep_ratio=0.1).ranks == {"a": 1}
    shape = LinearShape(768, 768)
    for rank in range(1, 384):
        assert uniform_ranks({"a": shape}, keep_ratio=rank / 384).ranks == {"a": rank}


def test_a_share_just_short_of_a_rank_does_not_get_it_from_another_layer() -> None:
    # 9.995 ranks of the square layer; the other one's 15.99 leave enough over to pay for the missing 0.005.
    shapes = {"square": LinearShape(768, 768), "wide": LinearShape(3072, 768)}
    assert uniform_ranks(shapes, keep_ratio=9.995 / 384).ranks == {"square": 9, "wide": 15}


def test_decimal_ratios_count_as_written() -> None:
    # In floating point 0.29 · 100 is 28.999999999999996.
    assert uniform_ranks({"a": LinearShape(100, 300)}, rank_ratio=0.29).ranks == {"a": 29}
    # 0.575 of 6,000 parameters pay for exactly 15 ranks at 230 each; floating point gives 3449.9999999999995.
    assert uniform_ranks({"a": LinearShape(30, 200)}, keep_ratio=0.575).ranks == {"a": 15}


def test_keeping_all_leaves_all_dense() -> None:
    allocation = uniform_ranks(MIXED, keep_ratio=1.0)
    assert set(allocation.ranks.values()) == {None}
    assert allocation.kept == allocation.dense == sum(s.dense_params for s in MIXED.values())


def test_more_kept_never_means_a_smaller_rank() -> None:
    before = dict.fromkeys(BERT_LAYER, 0)
    for percent in range(1, 100):
        for name, rank in uniform_ranks(BERT_LAYER, keep_ratio=percent / 100).ranks.items():
            assert rank is not None
            assert rank >= before[name]
            before[name] = rank


@pytest.mark.parametrize(("ratio", "rank"), [(0.33, 253), (0.22, 168), (0.25, 192), (1 / 768, 1), (0.0001, 1)])
def test_rank_ratio_is_a_share_of_the_full_rank(ratio: float, rank: int) -> None:
    assert set(uniform_ranks(BERT_LAYER, rank_ratio=ratio).ranks.values()) == {rank}
    assert rank == max(1, int(ratio * 768))


def test_rank_ratio_that_would_save_nothing_leaves_the_layer_dense() -> None:
    ranks = uniform_ranks(BERT_LAYER, rank_ratio=0.6).ranks
    # Rank 460: above the break-even rank 384 of the square layers, below 615 of the others.
    assert ranks == {
        "layer.0.attention.query": None,
        "layer.0.attention.key": None,
        "layer.0.intermediate": 460,
        "layer.0.output": 460,
    }
    exactly = uniform_ranks(BERT_LAYER, rank_ratio=0.5).ranks
    assert exactly["layer.0.attention.query"] is None  # 384, the break-even itself


def test_bert_base_at_rank_253_counts_as_in_the_papers() -> None:
    layer = {
        **{f"attention.{i}": LinearShape(768, 768) for i in range(4)},
        "up": LinearShape(3072, 768),
        "down": LinearShape(768, 3072),
    }
    shapes = {f"{block}.{name}": shape for block in range(12) for name, shape in layer.items()}
    allocation = uniform_ranks(shapes, rank_ratio=0.33)
    assert (allocation.dense, allocation.kept) == (84_934_656, 41_969_664)


@pytest.mark.parametrize("ratio", [0.2, 0.33, 0.37, 0.45])
@pytest.mark.parametrize("multiple_of", [8, 16, 64])
def test_ranks_are_rounded_to_a_neighbouring_multiple_within_the_budget(multiple_of: int, ratio: float) -> None:
    free = uniform_ranks(BERT_LAYER, keep_ratio=ratio).ranks
    allocation = uniform_ranks(BERT_LAYER, keep_ratio=ratio, multiple_of=multiple_of)
    assert allocation.kept <= ratio * allocation.dense
    for name, rank in allocation.ranks.items():
        unrounded = free[name]
        assert rank is not None
        assert unrounded is not None
        down = unrounded // multiple_of * multiple_of
        assert rank in (down, down + multiple_of)
        if rank > down:
            assert rank - unrounded <= multiple_of / 2  # the nearer of the two


def test_what_rounding_down_saves_goes_to_the_layers_nearest_to_the_next_multiple() -> None:
    """The shares are 63.36 and 101.376 ranks: 64 and 96 together keep less than a third."""
    shapes = {"q": LinearShape(384, 384), "k": LinearShape(384, 384), "up": LinearShape(1536, 384)}
    assert uniform_ranks(shapes, keep_ratio=0.33, multiple_of=16).ranks == {"q": 64, "k": 64, "up": 96}
    # The budget of 10.8 ranks pays for two of three: the first in the order of layers get them.
    squares = {name: LinearShape(20, 20) for name in ("a", "b", "c")}
    assert uniform_ranks(squares, keep_ratio=0.36, multiple_of=2).ranks == {"a": 4, "b": 4, "c": 2}
    # By rank_ratio there is no budget to spend: down, as the papers count.
    assert uniform_ranks(squares, rank_ratio=0.19, multiple_of=2).ranks == {"a": 2, "b": 2, "c": 2}


def test_a_rank_below_the_multiple_stays() -> None:
    assert uniform_ranks({"a": LinearShape(20, 20)}, keep_ratio=0.35, multiple_of=8).ranks == {"a": 3}


# At 0.3125 the large layer's share is exactly rank 10, and the tiny one's is half of a rank.
UNEVEN = {"large": LinearShape(64, 64), "tiny": LinearShape(2, 8)}


def test_the_minimum_of_one_rank_is_taken_from_others() -> None:
    assert uniform_ranks({"large": UNEVEN["large"]}, keep_ratio=0.3125).ranks == {"large": 10}
    allocation = uniform_ranks(UNEVEN, keep_ratio=0.3125)
    assert allocation.ranks == {"large": 9, "tiny": 1}
    assert allocation.kept == 9 * 128 + 10 <= 0.3125 * allocation.dense


def test_what_is_taken_from_others_leaves_them_at_a_multiple() -> None:
    assert uniform_ranks(UNEVEN, keep_ratio=0.3125, multiple_of=5).ranks == {"large": 5, "tiny": 1}


def test_a_budget_that_pays_exactly_for_one_rank_each_is_met() -> None:
    shapes = {"a": LinearShape(8, 8), "b": LinearShape(2, 16), "c": LinearShape(1, 9)}
    # One rank each costs 16 and 18; the single row costs less dense (9) than in factors (10).
    assert floor_cost(shapes, Parameters()) == 16 + 18 + 9
    allocation = uniform_ranks(shapes, keep_ratio=43 / 105)
    assert allocation.ranks == {"a": 1, "b": 1, "c": None}
    assert allocation.kept == 43


def test_a_budget_below_one_rank_each_is_refused_with_the_floor() -> None:
    shapes = {"a": LinearShape(8, 8), "b": LinearShape(2, 16), "c": LinearShape(1, 9)}
    with pytest.raises(BudgetError) as caught:
        uniform_ranks(shapes, keep_ratio=0.4)
    for part in ("keep_ratio=0.4", "43 of 105", f"{43 / 105:.6f}"):
        assert part in str(caught.value)
    # Rank ratios have no budget to break.
    assert uniform_ranks(shapes, rank_ratio=0.01).ranks["a"] == 1


def test_overrides_say_rank_ratio_or_dense() -> None:
    overrides = [
        LayerOverride("*.query", rank=7),
        LayerOverride("*.key", keep_ratio=0.5),
        LayerOverride("*.output", dense=True),
    ]
    allocation = uniform_ranks(BERT_LAYER, keep_ratio=0.2, overrides=overrides)
    assert allocation.ranks == {
        "layer.0.attention.query": 7,
        "layer.0.attention.key": 192,
        "layer.0.intermediate": math.floor(0.2 * 3072 * 768 / 3840),
        "layer.0.output": None,
    }


def test_the_first_override_that_matches_wins() -> None:
    overrides = [LayerOverride("*.query", rank=7), LayerOverride("*.attention.*", rank=9)]
    ranks = uniform_ranks(BERT_LAYER, keep_ratio=0.2, overrides=overrides).ranks
    assert (ranks["layer.0.attention.query"], ranks["layer.0.attention.key"]) == (7, 9)
    ranks = uniform_ranks(BERT_LAYER, keep_ratio=0.2, overrides=overrides[::-1]).ranks
    assert (ranks["layer.0.attention.query"], ranks["layer.0.attention.key"]) == (9, 9)


def test_overrides_leave_the_share_of_the_others_alone() -> None:
    plain = uniform_ranks(MIXED, keep_ratio=0.5).ranks
    for override in (LayerOverride("layer.0.*", dense=True), LayerOverride("layer.0.*", rank=1)):
        ranks = uniform_ranks(MIXED, keep_ratio=0.5, overrides=[override]).ranks
        assert {n: r for n, r in ranks.items() if "layer.1" in n} == {n: r for n, r in plain.items() if "layer.1" in n}


def test_every_layer_may_be_overridden() -> None:
    assert uniform_ranks(MIXED, keep_ratio=0.01, overrides=[LayerOverride("*", rank=1)]).ranks["layer.0.up"] == 1


def test_an_overriding_rank_is_not_rounded_and_at_break_even_means_dense() -> None:
    ranks = uniform_ranks(
        BERT_LAYER, rank_ratio=0.2, multiple_of=8, overrides=[LayerOverride("*.query", rank=383)]
    ).ranks
    assert ranks["layer.0.attention.query"] == 383
    ranks = uniform_ranks(BERT_LAYER, rank_ratio=0.2, overrides=[LayerOverride("*.query", rank=384)]).ranks
    assert ranks["layer.0.attention.query"] is None


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (LayerOverride("*.query"), 0),
        (LayerOverride("*.query", rank=3, dense=True), 2),
        (LayerOverride("*.query", keep_ratio=0.1, rank=3), 2),
        (LayerOverride("*.query", keep_ratio=0.1, rank=3, dense=True), 3),
    ],
)
def test_an_override_says_exactly_one_thing(override: LayerOverride, said: int) -> None:
    with pytest.raises(OverrideError, match=rf"'\*\.query' says {said} of keep_ratio, rank and dense"):
        uniform_ranks(BERT_LAYER, keep_ratio=0.2, overrides=[override])


def test_an_override_that_matches_nothing_is_refused_with_names() -> None:
    with pytest.raises(OverrideError) as caught:
        uniform_ranks(BERT_LAYER, keep_ratio=0.2, overrides=[LayerOverride("*.Query", rank=3)])
    assert "'*.Query' matches no targeted layer" in str(caught.value)
    assert "'layer.0.attention.query'" in str(caught.value)


def test_an_override_hidden_behind_an_earlier_one_is_no_error() -> None:
    overrides = [LayerOverride("*", rank=2), LayerOverride("*.query", rank=3)]
    assert set(uniform_ranks(BERT_LAYER, rank_ratio=0.2, overrides=overrides).ranks.values()) == {2}


@pytest.mark.parametrize("rank", [0, -1, 769])
def test_an_overriding_rank_out_of_range_names_the_layer(rank: int) -> None:
    with pytest.raises(RankError, match=rf"rank {rank} for 'layer\.0\.attention\.query'.*= 768"):
        uniform_ranks(BERT_LAYER, rank_ratio=0.2, overrides=[LayerOverride("*.query", rank=rank)])


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.0001, 33.0, float("nan"), float("inf")])
def test_ratios_out_of_range_are_refused_by_name(ratio: float) -> None:
    with pytest.raises(RatioError) as caught:
        uniform_ranks(BERT_LAYER, keep_ratio=ratio)
    assert f"keep_ratio={ratio!r} is out of range: allowed is 0 < keep_ratio <= 1" in str(caught.value)
    with pytest.raises(RatioError) as caught:
        uniform_ranks(BERT_LAYER, rank_ratio=ratio)
    assert f"rank_ratio={ratio!r}" in str(caught.value)
    with pytest.raises(RatioError) as caught:
        uniform_ranks(BERT_LAYER, rank_ratio=0.2, overrides=[LayerOverride("*.key", keep_ratio=ratio)])
    assert "overrides['*.key'].keep_ratio" in str(caught.value)


@pytest.mark.parametrize("multiple_of", [0, -8])
def test_a_multiple_below_one_is_refused(multiple_of: int) -> None:
    with pytest.raises(RangeError, match=f"multiple_of={multiple_of}"):
        uniform_ranks(BERT_LAYER, keep_ratio=0.2, multiple_of=multiple_of)


def test_exactly_one_ratio_is_given() -> None:
    with pytest.raises(ExclusiveArgumentsError, match="none of keep_ratio, rank_ratio"):
        uniform_ranks(BERT_LAYER)
    with pytest.raises(ExclusiveArgumentsError, match="keep_ratio and rank_ratio are given together"):
        uniform_ranks(BERT_LAYER, keep_ratio=0.2, rank_ratio=0.2)


def test_allocation_counts_dense_and_factorised_layers() -> None:
    allocation = Allocation({"a": LinearShape(4, 6), "b": LinearShape(5, 5)}, {"a": 2, "b": None})
    assert (allocation.parameters("a"), allocation.parameters("b")) == (20, 25)
    assert (allocation.kept, allocation.dense) == (45, 49)
