"""Write a detector to one file that runs without this project, and compare the file with the detector.

    python -m macl.export --checkpoint runs/NAME/best.pt --output detector.onnx
    python -m macl.export --checkpoint runs/NAME/best.pt --output infrared.onnx --cameras infrared
    python -m macl.export --checkpoint runs/NAME/best.pt --output detector.pt2

.onnx is for ONNX Runtime and the like, of ONNX's own operators alone; .pt2 is a program of torch.export, for torch and
torchvision. Both take any number of images of any size. Needs the extra export.
"""

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim

from kernels.dispatch import operator
from macl.backbone import MODALITIES
from macl.build import MERGES, load_detector, read_checkpoint
from macl.data import SyntheticPairs, to_float
from macl.detector import PairedFasterRCNN
from macl.static import StaticDetector, survivors
from trainkit.arguments import fraction, make_parser
from trainkit.errors import InputError, one_sentence
from trainkit.files import whole_file
from trainkit.onnx_file import need_packages, onnx_file, onnx_function

OUTPUTS = ("boxes", "labels", "scores", "count")
TRACED = (2, 3, 160, 224)  # images
CHECKED = ((128, 160), (100, 150), (200, 264))  # sizes of the drawn pairs that a file is tried on, two of each
TOLERANCE = (1e-3, 1e-4)  # pixels, and of a score


# In the traced program this is one node, which ONNX has an operator for.
_survivors = operator("survivors", "(Tensor boxes, Tensor scores, float iou) -> Tensor")(survivors)
torch.library.register_fake(_survivors)(lambda boxes, scores, iou: torch.empty_like(scores, dtype=torch.bool))


def onnx_survivors(boxes, scores, iou: float):
    """`survivors` in ONNX. NonMaxSuppression lists (set, class, row) of scores above -0.5; these become true."""
    from onnxscript import BOOL
    from onnxscript import opset18 as op

    kept = op.NonMaxSuppression(boxes, op.Unsqueeze(scores, [1]), torch.iinfo(torch.int64).max, iou, -0.5)
    true = op.Expand(op.Cast([1], to=BOOL.dtype), op.Shape(kept, start=0, end=1))
    return op.ScatterND(op.Cast(scores * 0.0, to=BOOL.dtype), op.Gather(kept, [0, 2], axis=1), true)


def least_side(detector: PairedFasterRCNN) -> int:
    """Pixels of which the coarsest map has two rows: of one, torch.export makes another program."""
    least, small = 2 ** (detector.kwargs["fpn_levels"] + 1) + 1, detector.min_sizes[-1]
    if small is not None and small < least:
        raise InputError(f"images of {small} pixels (--min-size) are too small for a file; expected {least} at least")
    return max(least, 32)


@torch.no_grad()
def exported(
    detector: PairedFasterRCNN, cameras: tuple[str, ...], suffix: str, metadata: dict
) -> tuple[bytes, Callable[..., list[Tensor]]]:
    """The file of a detector, and what it does with images (B, 3, H, W) by camera. metadata: plain values by name."""
    images, sides = {name: torch.rand(TRACED) for name in cameras}, dict(min=least_side(detector), max=8192)
    shapes = dict.fromkeys(cameras, {0: Dim("batch", max=1024), 2: Dim("height", **sides), 3: Dim("width", **sides)})
    if suffix == ".onnx":
        static, more = StaticDetector(detector, _survivors), dict(metadata=metadata, nodes={_survivors: onnx_survivors})
        content = onnx_file(static, images, shapes, OUTPUTS, **more)
        return content, onnx_function(content)
    static, file = StaticDetector(detector), io.BytesIO()
    traced = torch.export.export(static, (), images, dynamic_shapes=shapes, strict=False)
    torch.export.save(traced, file, extra_files={"metadata.json": json.dumps(metadata)})
    return file.getvalue(), torch.export.load(io.BytesIO(file.getvalue())).module()


@torch.no_grad()
def check(run: Callable[..., list[Tensor]], detector: PairedFasterRCNN, cameras: tuple[str, ...]) -> str:
    """Run a file beside the detector; a sentence on how they compare. Raises InputError where they differ."""
    count, most = 0, torch.zeros(2)
    for size in CHECKED:
        pairs = SyntheticPairs(2, 30_000, size=size)
        images = {name: [to_float(sample[name]) for sample in pairs] for name in cameras}
        outputs = run(**{name: torch.stack(given) for name, given in images.items()})
        for *rows, number, expected in zip(*outputs, detector(**images), strict=True):
            found = dict(zip(OUTPUTS, (part[:number] for part in rows), strict=False))
            count += len(expected["scores"])
            most = torch.maximum(most, difference(found, expected))
    pixels, score = most.tolist()
    text = f"{count} detections in drawn images differ by at most {pixels:.1e} pixels and {score:.1e} of a score"
    if not (pixels <= TOLERANCE[0] and score <= TOLERANCE[1]):
        raise InputError(f"the file would not find what the detector finds: {text}; nothing is written")
    return text if count else "nothing was found in the drawn images, by the file and by the detector"


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> Tensor:
    """Largest difference of a box's side and of a score (2,), of the rows that lie next to each other."""
    if len(found["scores"]) != len(expected["scores"]):
        return torch.full((2,), torch.inf)
    if not len(expected["scores"]):
        return torch.zeros(2)
    apart = torch.cdist(expected["boxes"], found["boxes"], p=torch.inf)
    apart = apart.masked_fill(expected["labels"][:, None] != found["labels"], torch.inf)
    pixels, nearest = apart.min(dim=1)  # nearly equal scores may change places
    return torch.stack([pixels.max(), (found["scores"][nearest] - expected["scores"]).abs().max()])


# fmt: off
def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="best.pt or last.pt of a run")
    add("--output", required=True, type=Path, metavar="FILE", help="a name that ends in .onnx or .pt2")
    add("--cameras", choices=("both", *MODALITIES), help="whose images the file takes (default: the detector's)")
    add("--merge", choices=MERGES, help="boxes of both cameras and of each alone (default: the checkpoint's)")
    add("--min-score", type=fraction, metavar="X", help="lowest score of a detection (default: the checkpoint's)")
    add("--weights", choices=("ema", "raw"), default="ema", help="averaged weights if any, or raw ones")
# fmt: on


def main(arguments: list[str] | None = None) -> None:
    """Write a file that was compared. arguments: without the program's name."""
    parser = make_parser(__doc__)
    add_arguments(parser)
    args = parser.parse_args(arguments)
    suffix = args.output.suffix
    if suffix not in (".onnx", ".pt2") or not args.output.absolute().parent.is_dir():
        raise InputError(f"--output {args.output}: expected a name that ends in .onnx or .pt2, in a folder that exists")
    if suffix == ".onnx":
        need_packages()
    checkpoint = read_checkpoint(args.checkpoint)
    detector = load_detector(args.checkpoint, weights=args.weights, checkpoint=checkpoint)
    only = detector.fusion.kind if detector.fusion.kind in MODALITIES else None
    cameras = args.cameras or only or "both"
    if only not in (None, cameras):
        raise InputError(f"--cameras {cameras}: this detector sees with {only} images alone")
    names = MODALITIES if cameras == "both" else (cameras,)
    kwargs, detector.merge, detector.macl = detector.kwargs, args.merge or detector.merge, None
    if args.min_score is not None:
        detector.roi_head.score_threshold = args.min_score
    metadata = dict(
        classes=kwargs["classes"], cameras=list(names), score_threshold=detector.roi_head.score_threshold,
        images="(batch, 3, height, width), RGB in 0..1, of any size, which is that of both cameras; boxes in pixels",
        inside="resizing to min_size, mean, std and suppression", min_size=detector.min_sizes[-1],
        max_size=detector.max_size, merge=detector.merge, register=checkpoint.get("register", "none"),
        reading=checkpoint.get("reading"),
        **{f"{name}_{kind}": kwargs[f"{name}_{kind}"] for name in names for kind in ("mean", "std")},
    )  # fmt: skip
    content, run = exported(detector, names, suffix, metadata)
    print(check(run, detector, names))
    with whole_file(args.output) as file:
        file.write(content)
    print(f"wrote {args.output}, {len(content) / 2**20:.1f} MiB")


if __name__ == "__main__":
    with one_sentence():
        main()
