"""What a detector can show of its reasons: which camera finds each box by itself, and where MSP looks."""

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.ops import box_iou
from torchvision.transforms.v2.functional import to_pil_image

from macl.backbone import MODALITIES
from macl.detector import PairedFasterRCNN
from macl.merging import FLOOR, SAME
from trainkit.drawing import Mark, draw_marks, heat

# By whether visible, and infrared, finds a box alone.
FOUND_BY = {(True, True): "by each camera", (True, False): "by visible alone", (False, True): "by infrared alone",
            (False, False): "by both together only"}  # fmt: skip
DETECTION = "detection"  # of one camera
COLOURS = ((255, 158, 44), (70, 200, 255), (240, 110, 170), (165, 165, 165), (255, 158, 44))
COLOURS = dict(zip((*FOUND_BY.values(), DETECTION), COLOURS, strict=True))


def has_reasons(detector: PairedFasterRCNN, cameras: int) -> bool:
    """Whether there is anything to show: two cameras that both count, or an MSP that does something."""
    return (cameras == 2 and len(detector.modes) > 1) or (
        detector.neck.msp is not None and bool(detector.neck.msp.gate)
    )


def explain(detector: PairedFasterRCNN, images: dict[str, list[Tensor]]) -> tuple[dict, dict, dict]:
    """Detections of one image or pair, as `PairedFasterRCNN.forward` takes and gives them; and with them

    by modality, for both, the best score (n,) of what that camera alone finds there, of the same class and with an IoU
    above SAME, 0 where it finds nothing; and by modality the factors (H, W) of MSP, the mean over the pyramid's maps.
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
    return detections, evidence, factors


def draw_reasons(
    sample: dict, detections: dict, evidence: dict, factors: dict, *, classes: list[str], min_score: float
) -> Image.Image:
    """Boxes in the colour of what finds them with a score of at least min_score, on the images and MSP's factors."""
    panels = {name: to_pil_image(sample[name]) for name in MODALITIES if sample[name] is not None}
    for name, values in factors.items():
        title = f"{name}: MSP's factor, {values.min():.3f} to {values.max():.3f}"
        panels[title] = heat(panels[name], values.cpu().numpy())
    marks, rows = [], zip(*(detections[name].tolist() for name in ("boxes", "labels", "scores")), strict=True)
    for place, (box, label, score) in enumerate(rows):
        alone = {name: scores[place].item() for name, scores in evidence.items()}
        kind = FOUND_BY[tuple(one >= min_score for one in alone.values())] if alone else DETECTION
        words = [f"{classes[label - 1]} {score:.2f}", *(f"{name[0]} {one:.2f}" for name, one in alone.items())]
        marks.append(Mark(box, kind, " ".join(words)))
    return draw_marks(panels, marks[::-1], COLOURS)  # the best ones on top
