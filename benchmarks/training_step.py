"""How fast is a training step of our detector beside torchvision's, and how much memory does it take?

    python benchmarks/training_step.py                      # single modality, 512x640, 512 RoIs an image
    python benchmarks/training_step.py --device cuda --amp bf16 --batch-size 8

Both detectors are ResNet-50 FPN with frozen batch norms and the same weights, see the same images and boxes, keep the
same numbers of proposals and sample the same number of RoIs. Each runs in a process of its own; their steps (forward,
backward; no optimizer) take turns, so that whatever else the machine does meets all: what counts is the ratio. On a CPU
torchvision's runs twice: in a process set up as our training scripts set up theirs (training/host.py), and in one as it
comes.
"""

import argparse
import contextlib
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
PLAIN = "torchvision, process as it comes"
if "--serve" in sys.argv and PLAIN not in sys.argv:  # not in the process that starts them: they inherit its environment
    import training.host  # noqa: F401  before torch

import torch
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

import macl

AMP = {"none": None, "fp16": torch.float16, "bf16": torch.bfloat16}
PROPOSALS = 1000


def models(args: argparse.Namespace) -> dict:
    """Both detectors with the same weights, as callables images, targets -> losses."""
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
    for model in (ours, theirs):
        model.to(args.device).train()
    return {
        "macl": (ours, lambda images, targets: ours(visible=images, targets=targets)),
        "torchvision": (theirs, lambda images, targets: theirs(images, targets)),
    }


def data(args: argparse.Namespace) -> tuple[list, list]:
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(3, args.height, args.width, generator=generator) for _ in range(args.batch_size)]
    corner = torch.rand(8, 2, generator=generator) * torch.tensor([args.width - 60.0, args.height - 130.0])
    size = torch.tensor([20.0, 50.0]) + torch.rand(8, 2, generator=generator) * torch.tensor([40.0, 80.0])
    target = {"boxes": torch.cat([corner, corner + size], 1), "labels": torch.ones(8, dtype=torch.int64)}
    move = {name: value.to(args.device) for name, value in target.items()}
    return [image.to(args.device) for image in images], [move] * args.batch_size


def step(model, losses, images, targets, dtype) -> float:
    """Seconds of one forward and backward."""
    device = images[0].device.type
    model.zero_grad(set_to_none=True)
    began = time.perf_counter()
    with torch.autocast(device, dtype=dtype) if dtype else contextlib.nullcontext():
        total = sum(losses(images, targets).values())
    total.backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def serve(args: argparse.Namespace) -> None:
    """One detector's process: a step for every line that comes in, then the peak memory in GiB."""
    both = models(args)
    model, losses = both.pop(args.serve.split(",")[0])
    both.clear()
    images, targets = data(args)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in sys.stdin:
        print(step(model, losses, images, targets, AMP[args.amp]), flush=True)
    if args.device == "cuda":
        print(torch.cuda.max_memory_allocated() / 2**30)
        return
    # Not ru_maxrss, which a process inherits from the one that started it (getrusage(2), Linux).
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(int(status["VmHWM"].split()[0]) / 2**20)


def start(args: argparse.Namespace, name: str) -> subprocess.Popen:
    command = [sys.executable, __file__, "--serve", name]
    for flag in ("batch_size", "height", "width", "rois", "device", "amp", "threads"):
        command += [f"--{flag.replace('_', '-')}", str(getattr(args, flag))]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def take_turns(args: argparse.Namespace, names: list[str]) -> tuple[dict, dict]:
    """name -> the seconds of its steps, and name -> its peak memory in GiB."""
    with contextlib.ExitStack() as stack:
        processes = {name: stack.enter_context(start(args, name)) for name in names}
        seconds = {name: [] for name in names}
        for round_ in range(args.rounds + 2):
            for name, process in processes.items():
                process.stdin.write("\n")
                process.stdin.flush()
                taken = process.stdout.readline()
                if not taken:
                    sys.exit(f"the process of {name} stopped: see above")
                if round_ >= 2:  # the first two warm up
                    seconds[name].append(float(taken))
        return seconds, {name: float(process.communicate()[0]) for name, process in processes.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=2, help="images a step")
    parser.add_argument("--height", type=int, default=512)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--rois", type=int, default=512, help="RoIs an image in the loss")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each that count")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", choices=tuple(AMP), default="none")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--write", action="store_true", help="write the table to benchmarks/results/")
    parser.add_argument("--serve", choices=("macl", "torchvision", PLAIN), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.serve:
        return serve(args)

    seconds, memory = take_turns(args, ["macl", "torchvision"] + ([PLAIN] if args.device == "cpu" else []))
    instructions = torch.backends.cpu.get_cpu_capability()
    processor = f"{args.threads} CPU threads, {platform.machine()} with {instructions}"
    machine = torch.cuda.get_device_name() if args.device == "cuda" else processor
    size = f"{args.height}x{args.width}, batch {args.batch_size}, {args.rois} RoIs an image"
    lines = [
        f"# Training step, {size}, amp {args.amp}",
        "",
        f"{machine}; torch {torch.__version__}; {time.strftime('%Y-%m-%d')}; {args.rounds} rounds of turns",
        "",
        "| detector | median s | min s | max s | peak GiB |",
        "|---|---|---|---|---|",
    ]
    for name, values in seconds.items():
        row = (statistics.median(values), min(values), max(values), memory[name])
        lines.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in row) + " |")
    for name in list(seconds)[1:]:
        ratios = sorted(theirs / ours for theirs, ours in zip(seconds[name], seconds["macl"], strict=True))
        lines += [
            "",
            f"{statistics.median(ratios):.2f}x as fast as {name} (median of the rounds, {ratios[0]:.2f} to "
            f"{ratios[-1]:.2f}), peak memory {memory['macl'] / memory[name]:.2f}x",
        ]
    print("\n".join(lines))
    if args.write:
        kind = f"-{instructions.lower()}" if args.device == "cpu" else ""
        name = f"training-step-{args.device}-{args.amp}{kind}.md"
        path = Path(__file__).resolve().parent / "results" / name
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
