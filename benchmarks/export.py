"""How fast is an exported detector, beside the detector and beside torchvision's, exported likewise?

    python benchmarks/export.py                        # ResNet-50, one image of 512x640, on the CPU

Both are ResNet-50 FPN with frozen norms, equal random weights and 1000 proposals. Ours runs with one camera, with both
in one pyramid, and with the merge of three views, which is the default. They take turns.
"""

import copy
import io
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import trainkit.process_setup  # noqa: F401  before torch

import onnxruntime
import torch

from benchmarks import common
from benchmarks.training_step import models
from macl import export
from macl.backbone import MODALITIES

VIEWS = {
    "one camera": (("visible",), "none"),
    "both, fused": (MODALITIES, "none"),
    "both, merged": (MODALITIES, "logit"),
}


def session(content: bytes, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def ours(detector: torch.nn.Module, images: dict, threads: int) -> dict:
    """Eager, compiled and exported, for each of VIEWS."""
    functions = {}
    for name, (cameras, merge) in VIEWS.items():
        one, given = copy.deepcopy(detector), {camera: images[camera] for camera in cameras}
        one.merge = merge
        functions[f"{name}: eager"] = lambda one=one, given=given: one(**{k: [v[0]] for k, v in given.items()})
        compiled = copy.deepcopy(one)
        compiled.backbone.compile()
        compiled.neck.compile()
        functions[f"{name}: compiled backbone and neck"] = lambda one=compiled, given=given: one(
            **{k: [v[0]] for k, v in given.items()}
        )
        file, _ = export.exported(one, cameras, ".onnx", {})
        run, arrays = session(file, threads), {k: v.numpy() for k, v in given.items()}
        functions[f"{name}: ONNX"] = lambda run=run, arrays=arrays: run.run(None, arrays)
    return functions


def theirs(detector: torch.nn.Module, image: torch.Tensor, threads: int) -> dict:
    """torchvision's, eager and exported by the tracing exporter, for which torchvision is written."""
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # the exporter is on its way out
        torch.onnx.export(detector, ([image[0]],), file, dynamo=False, opset_version=17, input_names=["image"])
    run, arrays = session(file.getvalue(), threads), {"image": image[0].numpy()}
    return {
        "torchvision: eager": lambda: detector([image[0]]),
        "torchvision: ONNX": lambda: run.run(None, arrays),
    }


@torch.no_grad()
def main() -> None:
    parser = common.make_parser(__doc__, rounds=5)
    parser.add_argument("--height", type=int, default=512, help="of the image, pixels (default: 512)")
    parser.add_argument("--width", type=int, default=640, help="of the image, pixels (default: 640)")
    args = parser.parse_args()
    args.rois = 512
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(1)
    images = {name: torch.rand(1, 3, args.height, args.width, generator=generator) for name in MODALITIES}
    both = {name: model.eval() for name, model in models(args).items()}
    functions = ours(both["macl"], images, args.threads) | theirs(both["torchvision"], images["visible"], args.threads)
    times = common.take_turns(functions, args.rounds)
    columns = [*common.TIME_COLUMNS[:-1], "time over one camera: ONNX (all rounds)"]
    report = [
        f"# Inference on the CPU, one image of {args.height}x{args.width}, ResNet-50, 1000 proposals",
        f"{common.machine(packages=('torchvision', 'onnxruntime'))}; {args.rounds} rounds",
        common.table(columns, common.time_rows(times, "one camera: ONNX")),
    ]
    common.finish(report, "export", args.write)


if __name__ == "__main__":
    main()
