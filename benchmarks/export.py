"""How fast is an exported detector, beside the detector and beside torchvision's, exported likewise?

    python benchmarks/export.py                        # ResNet-50, one image of 512x640, on the CPU

Both are ResNet-50 FPN with frozen norms, equal random weights and 1000 proposals. Ours runs with one camera, and with
two and the merge of three views, which is the default. They take turns.
"""

import copy
import io
import sys
import warnings
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import trainkit.process_setup  # noqa: F401  before torch

import onnxruntime
import torch

from benchmarks import common
from benchmarks.training_step import models
from macl import export
from macl.backbone import MODALITIES

VIEWS = {"one camera": (("visible",), "none"), "both, merged": (MODALITIES, "logit")}


def in_onnx(content: bytes, images: dict[str, torch.Tensor], threads: int):
    """A call of a file."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return partial(session.run, None, {name: image.numpy() for name, image in images.items()})


def ours(detector: torch.nn.Module, images: dict[str, torch.Tensor], threads: int, compile_too: bool) -> dict:
    """Calls of the detector: eager, compiled if asked for, and exported, for each of VIEWS."""
    functions = {}
    for name, (cameras, merge) in VIEWS.items():
        eager, given = copy.deepcopy(detector), {camera: images[camera] for camera in cameras}
        eager.merge, lists = merge, {camera: [image[0]] for camera, image in given.items()}
        functions[f"{name}: eager"] = partial(eager, **lists)
        if compile_too:
            compiled = copy.deepcopy(eager)
            compiled.backbone.compile()
            compiled.neck.compile()
            functions[f"{name}: compiled backbone and neck"] = partial(compiled, **lists)
        functions[f"{name}: ONNX"] = in_onnx(export.exported(eager, cameras, ".onnx", {})[0], given, threads)
    return functions


def theirs(detector: torch.nn.Module, image: torch.Tensor, threads: int) -> dict:
    """Calls of torchvision's: eager, and exported by tracing, which is what torchvision is written for."""
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # the exporter is on its way out
        torch.onnx.export(detector, ([image],), file, dynamo=False, opset_version=17, input_names=["image"])
    exported = in_onnx(file.getvalue(), {"image": image}, threads)
    return {"torchvision: eager": partial(detector, [image]), "torchvision: ONNX": exported}


@torch.no_grad()
def main() -> None:
    parser = common.make_parser(__doc__, rounds=5)
    parser.add_argument("--height", type=int, default=512, help="of the image, pixels (default: 512)")
    parser.add_argument("--width", type=int, default=640, help="of the image, pixels (default: 640)")
    parser.add_argument("--compile", action="store_true", help="also with backbone and neck compiled")
    args = parser.parse_args()
    args.rois = 512
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(1)
    images = {name: torch.rand(1, 3, args.height, args.width, generator=generator) for name in MODALITIES}
    both = {name: model.eval() for name, model in models(args).items()}
    functions = theirs(both["torchvision"], images["visible"][0], args.threads)
    functions |= ours(both["macl"], images, args.threads, args.compile)
    times = common.take_turns(functions, args.rounds)
    columns = [*common.TIME_COLUMNS[:-1], "time over one camera: ONNX (all rounds)"]
    report = [
        f"# Inference on the CPU, one image of {args.height}x{args.width}, ResNet-50, at most 1000 proposals",
        f"{common.machine(packages=('torchvision', 'onnxruntime'))}; {args.rounds} rounds",
        common.table(columns, common.time_rows(times, "one camera: ONNX")),
    ]
    common.finish(report, "export", args.write)


if __name__ == "__main__":
    main()
