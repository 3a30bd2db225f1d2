"""Layers that stand in for a linear layer. Needs torch alone."""

from lowrank_pl.nn.elastic_linear import ElasticLinear
from lowrank_pl.nn.final_form import FinalForm, final_form, restated
from lowrank_pl.nn.form import (
    Deployed,
    LinearForm,
    Spec,
    forms_in,
    forms_in_training,
    outside_forms,
    shape_of,
    whole_number,
)
from lowrank_pl.nn.low_rank_linear import LowRankLinear
from lowrank_pl.nn.pivoted_linear import PivotedLinear
from lowrank_pl.nn.svd_linear import SVDLinear
from lowrank_pl.nn.view import dense_shape, dense_weight, is_dense_linear

__all__ = [
    "Deployed",
    "ElasticLinear",
    "FinalForm",
    "LinearForm",
    "LowRankLinear",
    "PivotedLinear",
    "SVDLinear",
    "Spec",
    "dense_shape",
    "dense_weight",
    "final_form",
    "forms_in",
    "forms_in_training",
    "is_dense_linear",
    "outside_forms",
    "restated",
    "shape_of",
    "whole_number",
]
