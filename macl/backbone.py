"""ResNet feature maps with the norm layers, freezing and modality handling that the paired detector needs."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.ops import FrozenBatchNorm2d

NORMS = ("frozen_batch", "batch", "sync_batch", "group", "modality_batch")
MODALITIES = {"visible": "visible", "infrared": "infrared", "lwir": "infrared", "thermal": "infrared"}


class ModalityBatchNorm2d(nn.Module):
    """One BatchNorm a modality (domain-specific batch normalisation, Chang et al., 2019).

    `layout` says how the rows of the next batch divide: [("visible", rows), ("infrared", rows)], also under the names
    "lwir" and "thermal"; the backbone sets it. State dicts of a plain BatchNorm load into both copies.
    """

    def __init__(self, channels: int, *, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.visible = nn.BatchNorm2d(channels, eps=eps, momentum=momentum)
        self.infrared = nn.BatchNorm2d(channels, eps=eps, momentum=momentum)
        self._layout: list[tuple[str, int]] | None = None

    def set_layout(self, layout: Sequence[tuple[str, int]]) -> None:
        unknown = [name for name, _ in layout if name not in MODALITIES]
        if unknown:
            raise ValueError(f"modality {unknown[0]!r} is none of {', '.join(MODALITIES)}")
        self._layout = [(MODALITIES[name], rows) for name, rows in layout]

    def forward(self, x: Tensor) -> Tensor:
        if self._layout is None:
            raise ValueError(
                "call set_layout first: a modality norm must know which rows are visible and which infrared"
            )
        parts = x.split([rows for _, rows in self._layout])
        return torch.cat([getattr(self, name)(part) for (name, _), part in zip(self._layout, parts, strict=True)])

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        plain = [key for key in state_dict if key.startswith(prefix) and "." not in key[len(prefix) :]]
        for key in plain:
            value = state_dict.pop(key)
            for name in ("visible", "infrared"):
                state_dict[f"{prefix}{name}.{key[len(prefix) :]}"] = value
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def norm_layer(kind: str, *, eps: float = 1e-5):
    """A constructor channels -> norm layer: frozen_batch, batch, sync_batch, group (32 groups), modality_batch."""
    constructors = {
        "frozen_batch": lambda channels: FrozenBatchNorm2d(channels, eps=eps),
        "batch": lambda channels: nn.BatchNorm2d(channels, eps=eps),
        "sync_batch": lambda channels: nn.SyncBatchNorm(channels, eps=eps),
        "group": lambda channels: nn.GroupNorm(min(32, channels), channels, eps=eps),
        "modality_batch": lambda channels: ModalityBatchNorm2d(channels, eps=eps),
    }
    if kind not in constructors:
        raise ValueError(f"norm {kind!r} is none of {', '.join(NORMS)}")
    return constructors[kind]


def conv_norm(x: Tensor, conv: nn.Conv2d, norm: nn.Module) -> Tensor:
    """norm(conv(x)); the factors of a frozen norm go into the convolution's weight where that is the smaller tensor."""
    if not isinstance(norm, FrozenBatchNorm2d) or conv.weight.numel() > x.numel():
        return norm(conv(x))
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    bias = norm.bias - norm.running_mean * scale
    return F.conv2d(x, conv.weight * scale[:, None, None, None], bias, conv.stride, conv.padding)


class BasicBlock(resnet.BasicBlock):
    """torchvision's, with `conv_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(conv_norm(x, self.conv1, self.bn1))
        out = conv_norm(out, self.conv2, self.bn2)
        out += x if self.downsample is None else conv_norm(x, *self.downsample)
        return self.relu(out)


class Bottleneck(resnet.Bottleneck):
    """torchvision's, with `conv_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(conv_norm(x, self.conv1, self.bn1))
        out = self.relu(conv_norm(out, self.conv2, self.bn2))
        out = conv_norm(out, self.conv3, self.bn3)
        out += x if self.downsample is None else conv_norm(x, *self.downsample)
        return self.relu(out)


BACKBONES = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
}


class Backbone(nn.Module):
    """torchvision's ResNet up to the last stage that is asked for, run once over the images of both modalities.

    stages: how many of the four stages (C2 to C5) to compute and return. frozen_stages: 0 trains everything; n > 0
    freezes the stem and the first n stages for good: no gradient, and norms in eval mode after every `.train()`.
    """

    def __init__(self, name: str, *, norm: str, norm_eps: float = 1e-5, stages: int = 4, frozen_stages: int = 0):
        super().__init__()
        if name not in BACKBONES:
            raise ValueError(f"backbone {name!r} is none of {', '.join(BACKBONES)}")
        if not 0 <= frozen_stages <= 4:
            raise ValueError(f"frozen_stages is {frozen_stages}, must be 0 to 4")
        block, layers = BACKBONES[name]
        body = resnet.ResNet(block, list(layers), norm_layer=norm_layer(norm, eps=norm_eps))
        for stem in ("conv1", "bn1", "relu", "maxpool"):
            setattr(self, stem, getattr(body, stem))
        for stage in range(1, stages + 1):
            setattr(self, f"layer{stage}", getattr(body, f"layer{stage}"))
        self.stages = stages
        self.out_channels = [width * block.expansion for width in (64, 128, 256, 512)[:stages]]
        self.freeze(frozen_stages)

    def freeze(self, stages: int) -> None:
        """Freeze the stem and the first `stages` stages; 0 unfreezes everything."""
        self.frozen_stages = min(stages, self.stages)
        frozen = set(self._frozen_parts())
        for module in self.children():
            module.requires_grad_(module not in frozen)
        self.train(self.training)

    def _frozen_parts(self) -> list[nn.Module]:
        if self.frozen_stages == 0:
            return []
        return [self.conv1, self.bn1, *(getattr(self, f"layer{stage}") for stage in range(1, self.frozen_stages + 1))]

    def train(self, mode: bool = True):
        super().train(mode)
        for module in self._frozen_parts():
            module.eval()
        return self

    def forward(self, images: Tensor, layout: Sequence[tuple[str, int]]) -> list[Tensor]:
        """images: (B, 3, H, W), the modalities one after the other; layout: [("visible", rows), ("infrared", rows)].

        -> maps C2, C3, ... (B, C_l, H / 4, W / 4), ... One batch for both, so that shared statistics are those of both.
        """
        for module in self.modules():
            if isinstance(module, ModalityBatchNorm2d):
                module.set_layout(layout)
        x = self.maxpool(self.relu(conv_norm(images, self.conv1, self.bn1)))
        maps = []
        for stage in range(1, self.stages + 1):
            x = getattr(self, f"layer{stage}")(x)
            maps.append(x)
        return maps
