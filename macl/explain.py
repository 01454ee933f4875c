"""What a detector can show of its reasons: which camera finds each box by itself, and where MSP looks."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.ops import box_iou

from macl.detector import PairedFasterRCNN
from macl.merging import FLOOR, SAME


def has_reasons(detector: PairedFasterRCNN, cameras: int) -> bool:
    """Whether there is anything to show: two cameras that both count, or an MSP that does something."""
    return (cameras == 2 and len(detector.modes) > 1) or bool(detector.neck.msp is not None and detector.neck.msp.gate)


def explain(detector: PairedFasterRCNN, images: dict[str, list[Tensor]]) -> tuple[dict, dict[str, dict]]:
    """Detections of one image or pair, as `PairedFasterRCNN.forward` takes and gives them, and what can be shown of it:

    evidence, of two cameras: by modality the best score (n,) of what that camera alone finds there, of the same class
        and with an IoU above SAME, 0 where it finds nothing
    factors, with MSP: by modality those (H, W) by which it multiplies the maps, their mean over the pyramid
    """
    attention, msp = [], detector.neck.msp
    hook = msp and msp.attention.register_forward_hook(lambda _, inputs, output: attention.append(output))
    features = detector.extract(images)
    if hook:
        hook.remove()
    detections, evidence, factors = detector.detect(features)[0], {}, {}
    alone = {name: (name,) for name in images} if len(images) == 2 and len(detector.modes) > 1 else {}
    for name, (view,) in detector.detect_modes(features, alone, score_threshold=FLOOR).items():
        same = detections["labels"][:, None] == view["labels"]
        same &= box_iou(detections["boxes"], view["boxes"]) > SAME  # (n, m)
        evidence[name] = torch.cat([same * view["scores"], same.new_zeros(len(same), 1)], 1).amax(1)
    if msp is not None and msp.gate:
        height, width = features[0].sizes[0]
        maps = [interpolate(level.sigmoid(), size=features[0].batch_size, mode="bilinear") for level in attention]
        mean = torch.stack(maps).mean(0)[:, 0, :height, :width]  # (modalities, H, W)
        factors = {name: 1 + msp.gate * one for name, one in zip(images, mean, strict=True)}
    return detections, {"evidence": evidence, "factors": factors}
