"""ResNet (He et al., 2016) with a choice of norm layers, frozen stages and a norm per modality."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.ops import FrozenBatchNorm2d

MODALITIES = ("visible", "infrared")


class ModalityBatchNorm2d(nn.Module):
    """One BatchNorm per modality (domain-specific batch normalisation, Chang et al., 2019).

    layout: rows per modality of the next batch, set by the backbone. A plain BatchNorm's state dict loads into both.
    """

    def __init__(self, channels: int, *, eps: float = 1e-5):
        super().__init__()
        self.visible = nn.BatchNorm2d(channels, eps=eps)
        self.infrared = nn.BatchNorm2d(channels, eps=eps)
        self.layout: Sequence[tuple[str, int]] = ()

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split([rows for _, rows in self.layout])
        return torch.cat([getattr(self, name)(part) for (name, _), part in zip(self.layout, parts, strict=True)])

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        for key in [prefix + name for name in self.visible.state_dict() if prefix + name in state_dict]:
            value = state_dict.pop(key)
            state_dict |= {f"{prefix}{name}.{key.removeprefix(prefix)}": value for name in MODALITIES}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


NORMS = {
    "frozen_batch": FrozenBatchNorm2d,
    "batch": nn.BatchNorm2d,
    "sync_batch": nn.SyncBatchNorm,
    "group": lambda channels, eps: nn.GroupNorm(min(32, channels), channels, eps=eps),
    "modality_batch": ModalityBatchNorm2d,
}


def conv_norm(x: Tensor, conv: nn.Conv2d, norm: nn.Module) -> Tensor:
    """norm(conv(x)); a frozen norm is folded into the convolution's weight where that is smaller than the map."""
    if not isinstance(norm, FrozenBatchNorm2d) or torch.compiler.is_exporting() or conv.weight.numel() > x.numel():
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
    """torchvision's ResNet, run once over the images of both modalities.

    name: key of BACKBONES.
    norm: key of NORMS.
    stages: number of the four stages (C2 to C5) that are computed and returned.
    frozen_stages: see `freeze`.
    """

    def __init__(self, name: str, *, norm: str, norm_eps: float = 1e-5, stages: int = 4, frozen_stages: int = 0):
        super().__init__()
        block, layers = BACKBONES[name]
        body = resnet.ResNet(block, list(layers), norm_layer=partial(NORMS[norm], eps=norm_eps))
        names = [f"layer{stage}" for stage in range(1, stages + 1)]
        for part in ("conv1", "bn1", "relu", "maxpool", *names):
            setattr(self, part, getattr(body, part))
        self.stages = [getattr(self, part) for part in names]
        self.out_channels = [width * block.expansion for width in (64, 128, 256, 512)[:stages]]
        self.freeze(frozen_stages)

    def freeze(self, stages: int) -> None:
        """Freeze the stem and so many stages, with their norms in eval mode; 0 unfreezes everything."""
        self.frozen = [self.conv1, self.bn1, *self.stages[:stages]] if stages else []
        for module in self.children():
            module.requires_grad_(module not in self.frozen)
        self.train(self.training)

    def train(self, mode: bool = True):
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def forward(self, images: Tensor, layout: Sequence[tuple[str, int]]) -> list[Tensor]:
        """images: (B, 3, H, W). -> maps C2, C3, ... (B, C_l, H / 4, W / 4), ...

        layout: [("visible", rows), ("infrared", rows)]. One batch, so that both share a norm's statistics.
        """
        for module in self.modules():
            if isinstance(module, ModalityBatchNorm2d):
                module.layout = layout
        x = self.maxpool(self.relu(conv_norm(images, self.conv1, self.bn1)))
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps
