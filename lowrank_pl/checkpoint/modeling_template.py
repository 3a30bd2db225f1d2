"""A factorised encoder: layers as two thin factors, with the ranks that config.json names.

Written by lowrank_pl beside the weights; it needs torch and transformers alone. Load with
`AutoModelFor….from_pretrained(folder, trust_remote_code=True)`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel as Base
from transformers.pytorch_utils import Conv1D

LAYOUT_VERSION = 2


class LowRankLinear(nn.Module):
    """`y = left(right(x))`: two linears with the weights `[out, r]`, and a bias if there was one, and `[r, in]`."""

    def __init__(self, dense: nn.Linear | Conv1D, rank: int) -> None:
        super().__init__()
        m, n = shape(dense)
        self.left = empty(rank, m, dense)
        self.right = empty(n, rank, dense)
        self.left.bias = dense.bias

    @property
    def weight(self) -> Tensor:
        """The dense weight, for code that asks a linear layer for it."""
        return self.left.weight @ self.right.weight

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias, which `left` adds."""
        bias: nn.Parameter | None = self.left.bias
        return bias

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in] → [..., out]`."""
        y: Tensor = self.left(self.right(input))
        return y


class Product(nn.Module):
    """`y = x · weight`, `[..., rank] → [..., width]`."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, input: Tensor) -> Tensor:
        """`[..., rank] → [..., width]`."""
        return input @ self.weight


class LowRankEmbedding(nn.Module):
    """`y = right(left(token))`: a look-up of `[tokens, rank]`, then a product with `[rank, width]`."""

    def __init__(self, dense: nn.Embedding, rank: int) -> None:
        super().__init__()
        kind: dict[str, Any] = {"dtype": dense.weight.dtype, "device": dense.weight.device}
        self.num_embeddings, self.embedding_dim = dense.weight.shape
        self.padding_idx = dense.padding_idx
        with torch.device("meta"):
            self.left = nn.Embedding(self.num_embeddings, rank, dense.padding_idx)
        self.left.weight = nn.Parameter(torch.zeros(self.left.weight.shape, **kind))
        self.right = Product(nn.Parameter(torch.zeros(rank, self.embedding_dim, **kind)))

    @property
    def weight(self) -> Tensor:
        """The dense matrix, for code that asks a look-up for it."""
        return self.left.weight @ self.right.weight

    def forward(self, input: Tensor) -> Tensor:
        """`[...] → [..., width]`."""
        y: Tensor = self.right(self.left(input))
        return y


class PivotedLinear(nn.Module):
    """`y = [p; others(p)][order] + bias`, `p = pivots(x)`: linears with the weights `[r, in]` and `[out - r, r]`."""

    order: Tensor

    def __init__(self, dense: nn.Linear | Conv1D, rank: int) -> None:
        super().__init__()
        m, n = shape(dense)
        self.pivots = empty(n, rank, dense)
        self.others = empty(rank, m - rank, dense) if rank < m else None
        self.bias = dense.bias
        self.register_buffer("order", torch.zeros(m, dtype=torch.int32, device=dense.weight.device))

    @property
    def weight(self) -> Tensor:
        """The dense weight, for code that asks a linear layer for it."""
        rows: Tensor = self.pivots.weight
        if self.others is not None:
            rows = torch.cat([rows, self.others.weight @ rows])
        return rows.index_select(0, self.order)

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in] → [..., out]`."""
        y: Tensor = self.pivots(input)
        rank, m = self.pivots.weight.shape[0], self.order.shape[0]
        many = rank < input.numel() // input.shape[-1] and rank**2 < 64 * m
        if many and self.others is not None and not torch.compiler.is_compiling():  # fewer passes over the outputs
            k = self.others.weight
            left = torch.cat([torch.eye(rank, dtype=k.dtype, device=k.device), k]).index_select(0, self.order)
            return nn.functional.linear(y, left, self.bias)
        if self.others is not None:
            y = torch.cat([y, self.others(y)], -1)
        y = y.index_select(-1, self.order)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def shape(dense: nn.Linear | Conv1D) -> tuple[int, int]:
    """Outputs and inputs of a layer."""
    m, n = dense.weight.T.shape if isinstance(dense, Conv1D) else dense.weight.shape
    return m, n


def empty(n: int, m: int, dense: nn.Linear | Conv1D) -> nn.Linear:
    """A linear without bias, to be loaded: nothing random is drawn."""
    with torch.device("meta"):
        linear = nn.Linear(n, m, False)
    linear.weight = nn.Parameter(torch.zeros(m, n, dtype=dense.weight.dtype, device=dense.weight.device))
    return linear


# By what config.json calls a form: the class, and the layers that it stands for.
FORMS: dict[str, tuple[Any, Any]] = {
    "low_rank": (LowRankLinear, (nn.Linear, Conv1D)),
    "pivoted": (PivotedLinear, (nn.Linear, Conv1D)),
    "low_rank_embedding": (LowRankEmbedding, nn.Embedding),
}


class LowRankModel(Base):
    """The architecture of its parent with factorised layers."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        layout = config.lowrank_layout
        if layout["version"] != LAYOUT_VERSION:
            raise ValueError(f"layout version {layout['version']} is not {LAYOUT_VERSION}, the one this file reads")
        for name, spec in layout["modules"].items():
            old = self.get_submodule(name)
            form, stands_for = FORMS.get(spec["form"], (None, ()))
            if form is None or not isinstance(old, stands_for):
                raise ValueError(f"config.json has a {spec['form']} layer at {name!r}, the model {type(old).__name__}")
            new = form(old, spec["rank"])
            for parent in list(self.modules()):  # under every name, where a layer is shared
                for child, module in parent._modules.items():
                    if module is old:
                        parent._modules[child] = new

        for name, spec in layout["modules"].items():
            if "tied" in spec:
                self._tie(name, spec["tied"])
        self._keys_to_ignore_on_save = None  # saved again, the folder has to be complete

    def _tie(self, head: str, vocabulary: str) -> None:
        """Gives a head that puts out tokens the factors of the look-up, and tells transformers."""
        for part in ("left", "right"):
            shared = self.get_submodule(f"{vocabulary}.{part}").weight
            self.get_submodule(f"{head}.{part}").weight = shared
        names = {f"{head}.bias": f"{head}.left.bias"}
        for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
            ties = dict(getattr(self, attribute, None) or {})
            ties = {t: s for t, s in ties.items() if {t, s} != {f"{head}.weight", f"{vocabulary}.weight"}}
            ties = {names.get(t, t): names.get(s, s) for t, s in ties.items()}
            ties |= {f"{head}.{part}.weight": f"{vocabulary}.{part}.weight" for part in ("left", "right")}
            setattr(self, attribute, ties)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As the parent's, but a missing or unexpected weight is an error, never a random layer."""
        found: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = found
        wrong = {key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys") if info[key]}
        if wrong:
            raise ValueError(f"config.json and the weights disagree: {wrong}")
        for parameter in model.parameters():  # in a mapped file they begin anywhere, and kernels then add up otherwise
            if parameter.device.type == "cpu" and parameter.data_ptr() % 64:
                parameter.data = parameter.data.clone()
        return (model, info) if output_loading_info else model
