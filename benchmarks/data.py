"""How many pairs a second does one core load, decode and augment, against a plain PIL + torchvision pipeline?

    python benchmarks/data.py                            JPEG files of LLVIP's size, written to a temporary folder
    python benchmarks/data.py --root /data/LLVIP         real pairs
    python benchmarks/data.py --save                     also writes benchmarks/results/data-<machine>.md

Both pipelines do the same work in turns within one run: decode both images, shorter side to --size, horizontal flip,
brightness and contrast of visible, gain and offset of infrared, float32 in 0..1, boxes moved along.
"""

import argparse
import datetime
import os
import platform
import random
import re
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torchvision
from PIL import Image
from PIL import __version__ as pillow_version
from torchvision.transforms import ColorJitter
from torchvision.transforms import functional as v1

from macl.data import LLVIP, Augmented, PairedAugmentation, SyntheticPairs
from macl.data.voc import read_voc

BOX = (
    "<object><name>person</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)


class PlainPipeline:
    """The usual way: PIL images all along, one tensor at the end."""

    def __init__(self, dataset: LLVIP, size: int):
        self.dataset, self.size, self.jitter = dataset, size, ColorJitter(brightness=0.2, contrast=0.2)

    def __getitem__(self, index: int) -> dict:
        visible_path, infrared_path, annotation_path = self.dataset.paths(index)
        visible = Image.open(visible_path).convert("RGB")
        infrared = Image.open(infrared_path).convert("RGB")
        annotation = read_voc(annotation_path, classes=self.dataset.classes)
        boxes = annotation.boxes * (self.size / min(visible.size))
        visible, infrared = v1.resize(visible, self.size), v1.resize(infrared, self.size)
        if random.random() < 0.5:
            visible, infrared = v1.hflip(visible), v1.hflip(infrared)
            boxes[:, [0, 2]] = visible.width - boxes[:, [2, 0]]
        visible, infrared = v1.to_tensor(self.jitter(visible)), v1.to_tensor(infrared)
        infrared = (infrared * random.uniform(0.9, 1.1) + random.uniform(-0.05, 0.05)).clamp(0, 1)
        return {"visible": visible, "infrared": infrared, "boxes": boxes, "labels": annotation.labels}


def augmentation(sizes: tuple[int, ...] | None) -> PairedAugmentation:
    return PairedAugmentation(sizes=sizes, brightness=0.2, contrast=0.2, gain=0.1, offset=0.05)


def write_pairs(root: Path, count: int) -> None:
    """Pairs in LLVIP's layout and size: drawn scenes enlarged eight times."""
    for folder in ("visible/train", "infrared/train", "Annotations"):
        (root / folder).mkdir(parents=True)
    for index, sample in enumerate(SyntheticPairs(count, seed=0)[index] for index in range(count)):
        name = f"01{index:04d}"
        for modality in ("visible", "infrared"):
            image = Image.fromarray(sample[modality].permute(1, 2, 0).numpy())
            image.resize((1280, 1024), Image.Resampling.BICUBIC).save(
                root / modality / "train" / f"{name}.jpg", quality=90
            )
        boxes = [BOX.format(x1 + 1, y1 + 1, x2, y2) for x1, y1, x2, y2 in (8 * sample["boxes"]).int().tolist()]
        size = "<size><width>1280</width><height>1024</height></size>"
        (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{size}{''.join(boxes)}</annotation>")


def seconds_per_pair(load, count: int) -> float:
    start = time.perf_counter()
    for index in range(count):
        load(index)
    return (time.perf_counter() - start) / count


def compare(pipelines: dict, count: int, rounds: int) -> dict[str, list[float]]:
    """Seconds a pair of every pipeline in every round; the pipelines take turns, so that a busy machine slows all."""
    seconds = {name: [] for name in pipelines}
    for round_number in range(rounds + 1):
        for name, load in pipelines.items():
            taken = seconds_per_pair(load, count)
            if round_number:  # the first round warms caches
                seconds[name].append(taken)
    return seconds


def measure(root: Path, args: argparse.Namespace) -> list[str]:
    dataset = LLVIP(root, "train")
    count = min(args.pairs, len(dataset))
    ours = Augmented(dataset, augmentation((args.size,)), seed=0)
    plain = PlainPipeline(dataset, args.size)
    synthetic = SyntheticPairs(count, seed=0)
    drawn = Augmented(synthetic, augmentation(None), seed=0)
    seconds = compare(
        {
            "PIL + torchvision v1": plain.__getitem__,
            "this project": lambda index: ours[0, index],
            "of which read and decoded": dataset.__getitem__,
            "synthetic pairs, drawn and augmented": lambda index: drawn[0, index],
            "of which drawn": synthetic.__getitem__,
        },
        count,
        args.rounds,
    )
    height, width = dataset[0]["visible"].shape[-2:]
    kilobytes = (
        statistics.mean(path.stat().st_size for index in range(count) for path in dataset.paths(index)[:2]) / 1024
    )
    ratios = [a / b for a, b in zip(seconds["PIL + torchvision v1"], seconds["this project"], strict=True)]
    lines = [
        f"{count} pairs of {width} x {height} pixels ({kilobytes:.0f} KiB an image on average), shorter side to "
        f"{args.size}; medians of {args.rounds} rounds in turns, one thread.",
        "",
        "| pipeline | ms a pair | pairs a second and core |",
        "|---|---|---|",
    ]
    for name, taken in seconds.items():
        median = statistics.median(taken)
        lines.append(f"| {name} | {1000 * median:.1f} | {1 / median:.1f} |")
    lines += [
        "",
        f"This project against PIL + torchvision v1: {statistics.median(ratios):.2f} times as fast "
        f"({min(ratios):.2f} to {max(ratios):.2f} over the rounds).",
    ]
    return lines


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found.group(1) if found else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="LLVIP's folder (default: temporary files of its size)")
    parser.add_argument("--pairs", type=int, default=12, help="pairs a round (default: 12)")
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds (default: 9)")
    parser.add_argument("--size", type=int, default=512, help="shorter side after resizing, pixels (default: 512)")
    parser.add_argument("--save", action="store_true", help="write the table to benchmarks/results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.root is None:
        with tempfile.TemporaryDirectory() as folder:
            write_pairs(Path(folder), args.pairs)
            lines = measure(Path(folder), args)
    else:
        lines = measure(args.root, args)
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, Pillow {pillow_version}"
    files = "files written for the purpose" if args.root is None else "LLVIP's own files"
    load = f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"  # of all that runs on the machine
    heading = ["# Loading pairs", "", f"{cpu_name()}, {versions}, {datetime.date.today()}, {load}; {files}.", ""]
    report = "\n".join(heading + lines)
    print(report)
    if args.save:
        slug = re.sub(r"[^a-z0-9]+", "-", cpu_name().lower()).strip("-")
        target = Path(__file__).parent / "results" / f"data-{slug}{'' if args.root is None else '-llvip'}.md"
        target.parent.mkdir(exist_ok=True)
        target.write_text(report + "\n")
        print(f"\nwritten to {target}")


if __name__ == "__main__":
    main()
