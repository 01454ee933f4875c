"""Published weights: torchvision's Faster R-CNN (COCO) and ResNet (ImageNet) state dicts."""

import re
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from macl.backbone import BACKBONES, BasicBlock, Bottleneck
from trainkit.errors import InputError
from trainkit.files import read_torch, state_dict_of
from trainkit.load_report import LoadReport

# torchvision's names -> ours; the first two rows are for names from before its version 0.14.
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
COCO = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][1:]


def read_state(path: str | Path) -> dict:
    """A run's checkpoint, which has model_kwargs, or a state dict. Raises InputError for anything else."""
    content = read_torch(path, "a checkpoint or weights")
    return content if isinstance(content, dict) and "model_kwargs" in content else state_dict_of(content, path)


def has_old_names(state: dict[str, Tensor]) -> bool:
    """Whether a torchvision detector's names are those of 2019, when its FrozenBatchNorm had no eps."""
    return "rpn.head.conv.weight" in state


def load_torchvision_weights(detector: torch.nn.Module, source: str | Path | dict[str, Tensor]) -> LoadReport:
    """Load a `fasterrcnn_resnet50_fpn` (COCO) or ResNet (ImageNet) state dict, or its file, into a PairedFasterRCNN.

    Of COCO's 91 classes the rows of the background and of the detector's classes are kept, by name in small letters.
    Files with frozen norms (295 keys) and with BatchNorm (348 keys) fit any batch norm of the detector.
    Raises InputError where less than nine tenths of the backbone are filled.
    """
    from_file = isinstance(source, str | Path)
    name = str(source) if from_file else "the state dict"
    state = state_dict_of(read_torch(source, "weights") if from_file else source, name)
    report = LoadReport(name if from_file else "")
    if has_old_names(state):
        report.notes.append("published when FrozenBatchNorm had no eps: exact with norm_eps=0.0 of the detector")
    own, filled, classes = detector.state_dict(), {}, detector.kwargs["classes"]
    places: dict[str, list[str]] = {}  # one tensor fills both copies of a modality norm
    for key in own:
        places.setdefault(re.sub(r"\.(visible|infrared)\.", ".", key), []).append(key)
    renamed_keys = []
    for key, tensor in state.items():
        renamed = key
        for pattern, replacement in RENAMES:
            renamed = re.sub(pattern, replacement, renamed)
        renamed_keys.append(renamed)
        if renamed.startswith(("roi_head.cls_score.", "roi_head.bbox_pred.")) and renamed in own:
            fitting = coco_rows(tensor, own[renamed], classes)
            if fitting is not tensor and (new := [name for name in classes if name.lower() not in COCO]):
                report.made[renamed] = f"COCO's rows, but for {', '.join(new)}"
            tensor = fitting
        if renamed not in places:
            report.skipped[key] = "no such part in this detector"
        elif (wanted := own[places[renamed][0]].shape) != tensor.shape:
            report.skipped[key] = f"shape {tuple(tensor.shape)} where this detector has {tuple(wanted)}"
        else:
            filled |= dict.fromkeys(places[renamed], tensor)
    body = [key for key in own if key.startswith("backbone.") and not key.endswith("num_batches_tracked")]
    count = sum(key in filled for key in body)
    if count < ENOUGH * len(body):
        raise InputError(
            f"{name} looks like {architecture(renamed_keys)} and fills {count} of the {len(body)} tensors of this "
            f"detector's backbone, {detector.kwargs['backbone']}; choose --backbone by it, or torchvision's weights"
        )
    report.loaded = sorted(filled)
    report.missing = [key for key in own if key not in filled and not key.endswith("num_batches_tracked")]
    detector.load_state_dict(own | filled)
    return report


def architecture(keys: list[str]) -> str:
    """The ResNet whose backbone has tensors of these names, ours."""
    blocks = {tuple(key.split(".")[1:3]) for key in keys if key.startswith("backbone.layer")}
    layers = tuple(sum(stage == f"layer{number}" for stage, _ in blocks) for number in range(1, 5))
    block = Bottleneck if "backbone.layer1.0.conv3.weight" in keys else BasicBlock
    known = [name for name, sizes in BACKBONES.items() if sizes == (block, layers)]
    return known[0] if known else "another ResNet" if blocks else "no ResNet"


def coco_rows(tensor: Tensor, own: Tensor, classes: list[str]) -> Tensor:
    """The detector's `own` rows, in which COCO's classes have those of COCO's predictor; another `tensor` as it is."""
    if len(tensor) * (1 + len(classes)) != len(own) * (1 + len(COCO)) or len(classes) == len(COCO):
        return tensor
    return class_rows(tensor, COCO, own, [name.lower() for name in classes])


def class_rows(tensor: Tensor, before: list[str], own: Tensor, classes: list[str]) -> Tensor:
    """The `own` rows ((1 + len(classes)) * k, ...) of a predictor, background first, filled by the class's name.

    tensor: those of a predictor of the classes `before`; of another width it is returned as it is
    Names that are not among `before` keep their own rows.
    """
    if tensor.shape[1:] != own.shape[1:]:
        return tensor
    rows = tensor.unflatten(0, (1 + len(before), -1))
    filled = own.unflatten(0, (1 + len(classes), -1)).clone()
    for place, name in enumerate(["", *classes]):
        if not name or name in before:
            filled[place] = rows[1 + before.index(name) if name else 0]
    return filled.flatten(0, 1)
