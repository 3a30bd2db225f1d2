"""A factorised encoder: linear layers as two thin factors, with the ranks that config.json names.

Written by lowrank_pl beside the weights; it needs torch and transformers alone. Load with
`AutoModelFor….from_pretrained(folder, trust_remote_code=True)`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel as Base

LAYOUT_VERSION = 1


class LowRankLinear(nn.Module):
    """`y = left (right x) + bias`; `left [out, r]`, `right [r, in]`."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        kind: dict[str, Any] = {"dtype": linear.weight.dtype, "device": linear.weight.device}
        self.left = nn.Parameter(torch.zeros(linear.out_features, rank, **kind))
        self.right = nn.Parameter(torch.zeros(rank, linear.in_features, **kind))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in] → [..., out]`."""
        return F.linear(F.linear(x, self.right), self.left, self.bias)


class LowRankModel(Base):
    """The architecture of its parent with factorised layers."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        layout = config.lowrank_layout
        if layout["version"] != LAYOUT_VERSION:
            raise ValueError(f"layout version {layout['version']} is not {LAYOUT_VERSION}, the one this file reads")
        for name, (kind, rank) in layout["modules"].items():
            old = self.get_submodule(name)
            if kind != "low_rank" or not isinstance(old, nn.Linear):
                raise ValueError(f"config.json has a {kind} layer at {name!r}, the model {type(old).__name__}")
            new = LowRankLinear(old, rank)
            for parent in list(self.modules()):  # under every name, where a layer is shared
                for child, module in parent._modules.items():
                    if module is old:
                        parent._modules[child] = new

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As the parent's, but a missing or unexpected weight is an error, never a random layer."""
        found: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = found
        wrong = {key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys") if info[key]}
        if wrong:
            raise ValueError(f"config.json and the weights disagree: {wrong}")
        return (model, info) if output_loading_info else model
