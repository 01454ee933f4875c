"""Low-rank adaptation (Hu et al. 2021) of linear layers in the blocks of both towers."""

import math
from collections.abc import Collection

import torch.nn.functional as F
from torch import Tensor, nn

from fgclip.model import FGCLIP

TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


class LowRankLinear(nn.Linear):
    """W x + b + alpha / rank B A dropout(x), in which A (rank, in) and B (out, rank) learn. B is 0 at the start.

    W and b are those of `base`, under its names; lora_down is A, lora_up is B and lora_scale is alpha / rank.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__(base.in_features, base.out_features, device="meta")
        self.weight, self.bias, self.dropout = base.weight, base.bias, dropout
        self.lora_down = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_up = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        self.register_buffer("lora_scale", base.weight.new_tensor(alpha / rank))
        nn.init.kaiming_uniform_(self.lora_down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_down)
        return super().forward(x) + self.lora_scale * F.linear(low, self.lora_up)


def add_lora(model: FGCLIP, targets: Collection[str], *, rank: int, alpha: float, dropout: float) -> None:
    """Puts a `LowRankLinear` in the place of each of the TARGETS that is not frozen.

    All else is frozen but for the logit scales and a projection of the regions' own.
    """
    blocks = [block for tower in (model.vision_model, model.text_model) for block in tower.encoder.layers]
    places = [(part, name, layer) for block in blocks for part in block.children()
              for name, layer in part.named_children() if name in targets and layer.weight.requires_grad]  # fmt: skip
    for name, parameter in model.named_parameters():
        if not name.startswith(("logit_scale", "logit_bias", "roi_projection")):
            parameter.requires_grad_(False)
    for part, name, layer in places:
        setattr(part, name, LowRankLinear(layer, rank, alpha, dropout))


def merged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of the model without adapters: W + alpha / rank B A in the place of each adapted W."""
    merged = {name: tensor for name, tensor in state.items() if not name.rpartition(".")[2].startswith("lora_")}
    for name, up in state.items():
        layer, _, kind = name.rpartition(".")
        if kind == "lora_up":
            product = state[f"{layer}.lora_scale"] * (up @ state[f"{layer}.lora_down"])
            merged[f"{layer}.weight"] = state[f"{layer}.weight"] + product
    return merged
