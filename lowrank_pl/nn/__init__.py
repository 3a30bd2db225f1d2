"""Layers that stand in for a linear layer, or for a look-up. Needs torch alone."""

from lowrank_pl.nn.elastic_linear import ElasticLinear
from lowrank_pl.nn.final_form import FinalForm, final_form, in_two_factors, restated
from lowrank_pl.nn.form import (
    Deployed,
    LayerForm,
    LinearForm,
    Spec,
    forms_in,
    forms_in_training,
    outside_forms,
    shape_of,
    whole_number,
)
from lowrank_pl.nn.low_rank_embedding import LowRankEmbedding
from lowrank_pl.nn.low_rank_linear import LowRankLinear
from lowrank_pl.nn.pivoted_linear import PivotedLinear
from lowrank_pl.nn.svd_linear import SVDLinear
from lowrank_pl.nn.two_factors import form_for, two_factors
from lowrank_pl.nn.view import dense_shape, dense_weight, input_of, is_dense_linear, is_embedding

__all__ = [
    "Deployed",
    "ElasticLinear",
    "FinalForm",
    "LayerForm",
    "LinearForm",
    "LowRankEmbedding",
    "LowRankLinear",
    "PivotedLinear",
    "SVDLinear",
    "Spec",
    "dense_shape",
    "dense_weight",
    "final_form",
    "form_for",
    "forms_in",
    "forms_in_training",
    "in_two_factors",
    "input_of",
    "is_dense_linear",
    "is_embedding",
    "outside_forms",
    "restated",
    "shape_of",
    "two_factors",
    "whole_number",
]
