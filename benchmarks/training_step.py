"""How fast is a training step of our detector beside torchvision's, and how much memory does it take?

    python benchmarks/training_step.py                      # single modality, 512x640, 512 RoIs per image
    python benchmarks/training_step.py --device cuda --amp bf16 --batch-size 8

Both detectors are ResNet-50 FPN with frozen batch norms and the same weights. They see the same images and boxes, keep
as many proposals and sample as many RoIs. Each runs in a process of its own. Their steps (forward and backward, no
optimizer) take turns. On a CPU torchvision's runs twice: in a process set up as our training scripts set up theirs
(trainkit/process_setup.py), and in one as it comes.
"""

import argparse
import contextlib
import subprocess
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
PLAIN = "torchvision, process as it comes"
if "--serve" in sys.argv and PLAIN not in sys.argv:  # not in the process that starts them: they inherit its environment
    import trainkit.process_setup  # noqa: F401  before torch

import torch
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

import macl
from benchmarks import common
from trainkit.device import autocast, to_device

PROPOSALS = 1000


def models(args: argparse.Namespace) -> dict:
    """Both detectors with the same weights."""
    torch.manual_seed(0)
    # fasterrcnn_resnet50_fpn's own parts; its builder freezes the norms only where it downloads weights.
    theirs = FasterRCNN(
        resnet_fpn_backbone(
            backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=5
        ),
        num_classes=2, min_size=args.height, max_size=args.width, box_batch_size_per_image=args.rois,
        rpn_pre_nms_top_n_train=PROPOSALS, rpn_post_nms_top_n_train=PROPOSALS,
    )  # fmt: skip
    ours = macl.build_detector(
        norm="frozen_batch", macl_level="none", roi_samples=args.rois, rpn_pre_nms=(PROPOSALS,) * 2,
        rpn_post_nms=(PROPOSALS,) * 2,
    )  # fmt: skip
    macl.load_torchvision_weights(ours, theirs.state_dict())
    return {"macl": ours, "torchvision": theirs}


def batch(args: argparse.Namespace) -> tuple[list, list]:
    """Images of noise, and a target of eight boxes that they share."""
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(3, args.height, args.width, generator=generator) for _ in range(args.batch_size)]
    corner = torch.rand(8, 2, generator=generator) * torch.tensor([args.width - 60.0, args.height - 130.0])
    size = torch.tensor([20.0, 50.0]) + torch.rand(8, 2, generator=generator) * torch.tensor([40.0, 80.0])
    target = {"boxes": torch.cat([corner, corner + size], 1), "labels": torch.ones(8, dtype=torch.int64)}
    return to_device(images, args.device), [to_device(target, args.device)] * args.batch_size


def serve(args: argparse.Namespace) -> None:
    """The process of one detector: a step for each line that comes in, then the peak memory in MiB."""
    name = "macl" if args.serve == "macl" else "torchvision"
    model = models(args)[name].to(args.device).train()
    images, targets = batch(args)
    for _ in sys.stdin:
        model.zero_grad(set_to_none=True)
        with autocast(args.amp, args.device):
            losses = model(visible=images, targets=targets) if name == "macl" else model(images, targets)
        sum(losses.values()).backward()
        if args.device == "cuda":
            torch.cuda.synchronize()
        print(flush=True)
    print(common.memory(args.device, peak=True))


def measure(names: list[str], rounds: int) -> tuple[dict, dict]:
    """name -> seconds of each round, and name -> peak memory in MiB."""

    def request_step(name: str) -> None:
        print(file=processes[name].stdin, flush=True)
        if not processes[name].stdout.readline():
            sys.exit("the process of a detector stopped: see above")

    with contextlib.ExitStack() as stack:
        processes = {}
        for name in names:
            command = [sys.executable, *sys.argv, "--serve", name]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            processes[name] = stack.enter_context(process)
        times = common.take_turns({name: partial(request_step, name) for name in names}, rounds, warmup=2)
        return times, {name: float(process.communicate()[0]) for name, process in processes.items()}


def main() -> None:
    parser = common.make_parser(__doc__, rounds=7)
    common.add_step_flags(parser, batch_size=2)
    parser.add_argument("--height", type=int, default=512, help="of the images, pixels (default: 512)")
    parser.add_argument("--width", type=int, default=640, help="of the images, pixels (default: 640)")
    parser.add_argument("--rois", type=int, default=512, help="RoIs per image in the loss (default: 512)")
    parser.add_argument("--serve", choices=("macl", "torchvision", PLAIN), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.serve:
        return serve(args)

    times, peaks = measure(["macl", "torchvision"] + ([PLAIN] if args.device == "cpu" else []), args.rounds)
    rows = common.time_rows(times, "macl")
    for row, peak in zip(rows, peaks.values(), strict=True):
        row += [f"{peak:.0f}", f"{peaks['macl'] / peak:.2f}"]
    size = f"{args.height}x{args.width}, batch {args.batch_size}, {args.rois} RoIs per image"
    instructions = f"-{torch.backends.cpu.get_cpu_capability().lower()}" if args.device == "cpu" else ""
    report = [
        f"# Training step, {size}, amp {args.amp}",
        f"{common.machine(args.device, ('torchvision',))}; {args.rounds} rounds",
        common.table([*common.TIME_COLUMNS, "peak MiB", "our peak over it"], rows),
    ]
    common.finish(report, f"training-step-{args.device}-{args.amp}{instructions}", args.write)


if __name__ == "__main__":
    main()
