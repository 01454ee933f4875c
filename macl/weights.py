"""Published weights: torchvision's Faster R-CNN (COCO) and ResNet (ImageNet) state dicts, with a report of what went
where.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from macl.backbone import BACKBONES, Bottleneck
from trainkit.errors import InputError
from trainkit.files import read_torch, state_dict_of

# torchvision's names -> ours; the first two rows bring its names from before version 0.14 to the later ones.
RENAMES = [
    (r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$", r"\1.0.\2"),
    (r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.head.conv.0.0.\1"),
    (r"^backbone\.body\.", "backbone."),
    (r"^backbone\.fpn\.inner_blocks\.(\d+)\.0\.", r"neck.inner.\1."),
    (r"^backbone\.fpn\.layer_blocks\.(\d+)\.0\.", r"neck.outer.\1."),
    (r"^rpn\.head\.conv\.0\.0\.", "rpn.head.conv."),
    (r"^roi_heads\.box_head\.", "roi_head."),
    (r"^roi_heads\.box_predictor\.", "roi_head."),
]
ENOUGH = 0.9  # of the backbone's tensors
IMAGENET_KEY = re.compile(r"^(conv1|bn1|layer[1-4]|fc)\.")


@dataclass
class LoadReport:
    """Names of the detector's tensors that were `loaded`; of the source's that were `skipped`, with the reason; and
    of the detector's that are `missing` from the source and keep their initial values."""

    loaded: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"loaded {len(self.loaded)} tensors, skipped {len(self.skipped)}, left {len(self.missing)} as initialised"
        ]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            reasons.setdefault(reason, []).append(name)
        lines += [f"  skipped, {reason}: {summarise(names)}" for reason, names in reasons.items()]
        if self.missing:
            lines.append(f"  as initialised: {summarise(self.missing)}")
        return "\n".join(lines + [f"  {note}" for note in self.notes])


def summarise(names: list[str], shown: int = 6) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def read_state(path: str | Path) -> dict:
    """A run's checkpoint, told by its model_kwargs, or a state dict. Raises InputError where it is neither."""
    content = read_torch(path, "a checkpoint or weights")
    return content if isinstance(content, dict) and "model_kwargs" in content else state_dict_of(content, path)


def has_old_names(state: dict[str, Tensor]) -> bool:
    """Whether a torchvision detector's names are those of 2019, when its FrozenBatchNorm had no eps."""
    return "rpn.head.conv.weight" in state


def load_torchvision_weights(detector: torch.nn.Module, source: str | Path | dict[str, Tensor]) -> LoadReport:
    """Load a `fasterrcnn_resnet50_fpn` (COCO) or ResNet (ImageNet) state dict, from a path or a dict, into a
    PairedFasterRCNN.

    With COCO's 91 classes the rows of the detector's own classes are kept, by name (background, then "person", ...).
    Both the frozen (295 keys) and the BatchNorm (348 keys) form fit any batch norm of the detector. Raises InputError
    where nothing fits, or less than nine tenths of the backbone, whose rest would stay random.
    """
    state = dict(read_state(source) if isinstance(source, str | Path) else source)
    name = str(source) if isinstance(source, str | Path) else "the state dict"
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{name} is not a state dict: it must hold tensors only")
    report = LoadReport()
    if has_old_names(state):
        report.notes.append(
            "published before FrozenBatchNorm had an eps: build the detector with norm_eps=0.0 for its exact values"
        )
    own = detector.state_dict()
    groups = source_tensors(state, detector.kwargs.get("classes", ["person"]), report)
    filled = {}
    for key, tensor in groups.items():
        targets = [key] if key in own else [modality_copy(key, which) for which in ("visible", "infrared")]
        for target in targets:
            if target not in own:
                report.skipped[key] = "no such part in this detector"
            elif own[target].shape != tensor.shape:
                report.skipped[key] = f"shape {tuple(tensor.shape)} where this detector has {tuple(own[target].shape)}"
            else:
                filled[target] = tensor
    if not filled:
        raise InputError(f"nothing in {name} fits this detector; expected torchvision's Faster R-CNN or ResNet weights")
    body = [key for key in own if key.startswith("backbone.") and not key.endswith("num_batches_tracked")]
    count = sum(key in filled for key in body)
    if count < ENOUGH * len(body):
        raise InputError(
            f"{name} looks like {architecture(groups)}, and fills {count} of the {len(body)} tensors of this "
            f"detector's backbone, {detector.kwargs.get('backbone')}: choose --backbone by it"
        )
    report.loaded = sorted(filled)
    report.missing = [key for key in own if key not in filled and not key.endswith("num_batches_tracked")]
    detector.load_state_dict(own | filled)
    return report


def architecture(tensors: dict[str, Tensor]) -> str:
    """Which ResNet these tensors, under our names, are of."""
    blocks = {tuple(key.split(".")[1:3]) for key in tensors if key.startswith("backbone.layer")}
    stages = tuple(sum(stage == f"layer{n}" for stage, _ in blocks) for n in range(1, 5))
    deep, first = "backbone.layer1.0.conv3.weight" in tensors, tensors.get("backbone.layer1.0.conv2.weight")
    for known, (block, layers) in BACKBONES.items():
        if layers == stages and deep == (block is Bottleneck) and first is not None and first.shape[:2] == (64, 64):
            return known
    return "another ResNet" if any(stages) else "no ResNet"


def modality_copy(key: str, modality: str) -> str:
    """The key of one modality's copy of a batch norm: backbone.bn1.weight -> backbone.bn1.visible.weight."""
    module, _, tensor = key.rpartition(".")
    return f"{module}.{modality}.{tensor}"


def source_tensors(state: dict[str, Tensor], classes: list[str], report: LoadReport) -> dict[str, Tensor]:
    """The source's tensors under our names, class rows chosen; what has no place goes into the report."""
    tensors = {}
    imagenet = all(IMAGENET_KEY.match(key) for key in state)
    for original, tensor in state.items():
        key = f"backbone.body.{original}" if imagenet else original
        for pattern, replacement in RENAMES:
            key = re.sub(pattern, replacement, key)
        if key.startswith("backbone.fc."):
            report.skipped[original] = "the ImageNet classifier"
            continue
        if key.startswith(("roi_head.cls_score.", "roi_head.bbox_pred.")):
            tensor = class_rows(key, tensor, classes)
            if tensor is None:
                report.skipped[original] = f"no rows for the classes {', '.join(classes)}"
                continue
        tensors[key] = tensor
    return tensors


def class_rows(key: str, tensor: Tensor, classes: list[str]) -> Tensor | None:
    """The background's and the given classes' rows of a predictor over COCO's 91 classes; others pass unchanged."""
    coco = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    per_class = 4 if "bbox_pred" in key else 1
    if tensor.shape[0] != len(coco) * per_class or len(classes) + 1 == len(coco):
        return tensor
    if any(name not in coco for name in classes):
        return None
    rows = torch.tensor([0, *(coco.index(name) for name in classes)])
    return tensor.unflatten(0, (len(coco), per_class))[rows].flatten(0, 1)
