"""What averaged detectors give the one in training: keys for the contrast, and labels of a domain without any."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from macl.backbone import MODALITIES
from macl.boxes import own_boxes
from macl.detector import PairedFasterRCNN

DECAY = 0.98  # of the moving average that embeds keys
UNSURE = 0.3  # score from which a detection too weak for a label is ignored rather than background
NEW = 0  # the domain, as `JointDataset` counts them, that a labeller labels


class KeyEncoder(nn.Module):
    """Embeds the boxes of a batch as keys that age alike (He et al., MoCo, 2020, equation 2).

    Its moving average of the detector decays by DECAY from the first step on: the one that a run validates follows its
    first steps closely, and keys would age with it.

    detector: in training, with the weights that it starts from.
    """

    def __init__(self, detector: PairedFasterRCNN):
        super().__init__()
        self.average = AveragedModel(detector, multi_avg_fn=get_ema_multi_avg_fn(DECAY)).eval()

    def update(self, detector: PairedFasterRCNN) -> None:
        """Follow the detector; after every step."""
        self.average.update_parameters(detector)

    @torch.no_grad()
    def forward(self, visible: list[Tensor], infrared: list[Tensor], targets: list[dict]) -> list[dict]:
        """The targets with keys (n_i, 2, D), one row per box and modality; see `PairedFasterRCNN.forward`."""
        boxes, average = [own_boxes(target) for target in targets], self.average.module
        rows = torch.stack(average.embed(average.extract({"visible": visible, "infrared": infrared}), boxes), dim=1)
        rows = rows.split([len(box) for box in boxes])
        return [target | {"keys": keys} for target, keys in zip(targets, rows, strict=True)]


class Labeller:
    """Labels the images of domain NEW, whose own labels are put aside (Li et al., Adaptive Teacher, 2022, section 3.2).

    detector: a moving average of the one in training (Tarvainen and Valpola, 2017); this puts it into evaluation mode.
    threshold: score from which a detection becomes a label.
    """

    def __init__(self, detector: PairedFasterRCNN, threshold: float):
        self.detector, self.threshold = detector.eval(), threshold

    @torch.no_grad()
    def __call__(self, visible: list[Tensor], infrared: list[Tensor], targets: list[dict]) -> list[dict]:
        """The targets, with detections as labels where the domain is NEW; see `PairedFasterRCNN.forward`."""
        features = self.detector.extract({"visible": visible, "infrared": infrared})
        alone = (target["present"] for target in targets if target["domain"] == NEW and "present" in target)
        given = next(alone, torch.ones(2, dtype=torch.bool)).tolist()  # all of a domain have the same cameras
        modalities = [name for name, present in zip(MODALITIES, given, strict=True) if present]
        found = self.detector.detect(features, modalities, score_threshold=UNSURE, least=UNSURE)
        return [
            self.labelled(target, one) if target["domain"] == NEW else target
            for target, one in zip(targets, found, strict=True)
        ]

    def labelled(self, target: dict, found: dict) -> dict:
        """A target whose labels are detections."""
        own = {key: value for key, value in target.items() if key in ("scene", "domain", "present")}
        own |= {"visible_in": own["present"].expand(len(found["boxes"]), 2)} if "present" in own else {}
        return own | {"boxes": found["boxes"], "labels": found["labels"], "ignore": found["scores"] < self.threshold}
