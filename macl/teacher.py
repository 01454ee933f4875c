"""What an averaged detector gives the one in training: keys for the contrast, and labels of a domain without any."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from macl.detector import PairedFasterRCNN

DECAY = 0.98  # of the moving average
UNSURE = 0.3  # score from which a detection too weak for a label is ignored rather than background
NEW = 0  # the domain, as `JointDataset` counts them, that a teacher labels


class Teacher(nn.Module):
    """Fills in the targets of a batch from a moving average of the detector in training.

    The average (Tarvainen and Valpola, 2017, section 2) is the teacher's own and decays by DECAY from the first step
    on: that which a run validates follows its first steps closely, and keys would age with it.

    detector: in training, with the weights that it starts from.
    keys: whether to embed each box, as keys that age alike (He et al., MoCo, 2020, equation 2).
    threshold: score from which a detection becomes a label of an image of domain NEW, whose own labels are put aside
        (Li et al., Adaptive Teacher, 2022, section 3.2); None where all labels are known.
    """

    def __init__(self, detector: PairedFasterRCNN, *, keys: bool, threshold: float | None):
        super().__init__()
        self.average = AveragedModel(detector, multi_avg_fn=get_ema_multi_avg_fn(DECAY)).eval()
        self.keys, self.threshold = keys, threshold

    @property
    def detector(self) -> PairedFasterRCNN:
        return self.average.module

    def update(self, detector: PairedFasterRCNN) -> None:
        """Follow the detector; after every step."""
        self.average.update_parameters(detector)

    @torch.no_grad()
    def forward(self, visible: list[Tensor], infrared: list[Tensor], targets: list[dict]) -> list[dict]:
        """The targets with what is asked for; see `PairedFasterRCNN.forward` for all forms."""
        features = self.detector.extract({"visible": visible, "infrared": infrared})
        if self.threshold is not None:
            found = self.detector.detect(features, score_threshold=UNSURE)
            targets = [
                self.labelled(target, one) if target["domain"] == NEW else target
                for target, one in zip(targets, found, strict=True)
            ]
        if self.keys:
            rows = torch.stack(self.detector.embed(features, [target["boxes"] for target in targets]), dim=1)
            rows = rows.split([len(target["boxes"]) for target in targets])  # (n_i, 2, D)
            targets = [target | {"keys": keys} for target, keys in zip(targets, rows, strict=True)]
        return targets

    def labelled(self, target: dict, found: dict) -> dict:
        """A target whose labels are detections."""
        own = {key: value for key, value in target.items() if key in ("scene", "domain")}
        return own | {"boxes": found["boxes"], "labels": found["labels"], "ignore": found["scores"] < self.threshold}
