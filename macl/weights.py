"""Published weights: torchvision's Faster R-CNN (COCO) and ResNet (ImageNet) state dicts."""

import re
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from trainkit.errors import InputError
from trainkit.files import read_torch, state_dict_of
from trainkit.load_report import LoadReport

# torchvision's names -> ours; the first two rows bring its names from before version 0.14 to the later ones.
RENAMES = [
    (r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$", r"\1.0.\2"),
    (r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.head.conv.0.0.\1"),
    (r"^(?=(conv1|bn1|layer\d|fc)\.)", "backbone."),
    (r"^backbone\.body\.", "backbone."),
    (r"^backbone\.fpn\.inner_blocks\.(\d+)\.0\.", r"neck.inner.\1."),
    (r"^backbone\.fpn\.layer_blocks\.(\d+)\.0\.", r"neck.outer.\1."),
    (r"^rpn\.head\.conv\.0\.0\.", "rpn.head.conv."),
    (r"^roi_heads\.box_(head|predictor)\.", "roi_head."),
]
ENOUGH = 0.9  # of the backbone's tensors


def read_state(path: str | Path) -> dict:
    """A run's checkpoint, told by its model_kwargs, or a state dict. Raises InputError where it is neither."""
    content = read_torch(path, "a checkpoint or weights")
    return content if isinstance(content, dict) and "model_kwargs" in content else state_dict_of(content, path)


def has_old_names(state: dict[str, Tensor]) -> bool:
    """Whether a torchvision detector's names are those of 2019, when its FrozenBatchNorm had no eps."""
    return "rpn.head.conv.weight" in state


def load_torchvision_weights(detector: torch.nn.Module, source: str | Path | dict[str, Tensor]) -> LoadReport:
    """Load a `fasterrcnn_resnet50_fpn` (COCO) or ResNet (ImageNet) state dict, or its file, into a PairedFasterRCNN.

    Of COCO's 91 classes the rows of the detector's own classes are kept, by name (background, then "person", ...).
    Both the frozen (295 keys) and the BatchNorm (348 keys) form fit any batch norm of the detector. Raises InputError
    where less than nine tenths of the backbone are filled, whose rest would stay random.
    """
    from_file = isinstance(source, str | Path)
    name = str(source) if from_file else "the state dict"
    state = state_dict_of(read_torch(source, "weights") if from_file else source, name)
    report = LoadReport(name if from_file else "")
    if has_old_names(state):
        report.notes.append(
            "published before FrozenBatchNorm had an eps: build the detector with norm_eps=0.0 for its exact values"
        )
    own, filled, classes = detector.state_dict(), {}, detector.kwargs.get("classes", ["person"])
    places: dict[str, list[str]] = {}  # both copies of a modality norm are filled from one tensor
    for key in own:
        places.setdefault(re.sub(r"\.(visible|infrared)\.", ".", key), []).append(key)
    for key, tensor in state.items():
        renamed = key
        for pattern, replacement in RENAMES:
            renamed = re.sub(pattern, replacement, renamed)
        if renamed.startswith(("roi_head.cls_score.", "roi_head.bbox_pred.")):
            tensor = class_rows(tensor, classes, 4 if "bbox_pred" in renamed else 1)
        if tensor is None:
            report.skipped[key] = f"no rows for the classes {', '.join(classes)}"
        elif renamed not in places:
            report.skipped[key] = "no such part in this detector"
        elif (wanted := own[places[renamed][0]].shape) != tensor.shape:
            report.skipped[key] = f"shape {tuple(tensor.shape)} where this detector has {tuple(wanted)}"
        else:
            filled |= dict.fromkeys(places[renamed], tensor)
    body = [key for key in own if key.startswith("backbone.") and not key.endswith("num_batches_tracked")]
    count = sum(key in filled for key in body)
    if count < ENOUGH * len(body):
        raise InputError(
            f"{name} fills {count} of the {len(body)} tensors of this detector's backbone, "
            f"{detector.kwargs.get('backbone')}; expected torchvision's Faster R-CNN or ResNet weights of that backbone"
        )
    report.loaded = sorted(filled)
    report.missing = [key for key in own if key not in filled and not key.endswith("num_batches_tracked")]
    detector.load_state_dict(own | filled)
    return report


def class_rows(tensor: Tensor, classes: list[str], per_class: int) -> Tensor | None:
    """The background's and the given classes' rows of a predictor over COCO's 91 classes; others pass unchanged.

    None where one of the classes is not COCO's.
    """
    coco = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    if tensor.shape[0] != len(coco) * per_class or len(classes) + 1 == len(coco):
        return tensor
    if any(name not in coco for name in classes):
        return None
    rows = torch.tensor([0, *(coco.index(name) for name in classes)])
    return tensor.unflatten(0, (len(coco), per_class))[rows].flatten(0, 1)
