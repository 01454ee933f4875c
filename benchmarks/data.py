"""How many pairs per second does one core read, decode and augment, against a plain PIL + torchvision pipeline?

    python benchmarks/data.py                            JPEG files of LLVIP's size, written to a temporary folder
    python benchmarks/data.py --root /data/LLVIP         real pairs
    python benchmarks/data.py --write                    also writes benchmarks/results/data-<processor>.md

All decode both images, flip horizontally, change brightness, contrast and saturation of visible and gain and offset of
infrared, and return float32 in 0..1 at the size that a detector of --min-size 512 works on, with the boxes.
"""

import random
import re
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image
from torch.nn.functional import interpolate
from torchvision.transforms import ColorJitter
from torchvision.transforms import functional as v1

from benchmarks import common
from macl.data import LLVIP, AugmentedDataset, PairedAugmentation, SyntheticPairs

SHORT, LONG = 512, 704
BOX = "<object><name>person</name><bndbox>" + "".join(f"<{x}>{{}}</{x}>" for x in ("xmin", "ymin", "xmax", "ymax"))
BOX += "</bndbox></object>"


def resized(sample: dict) -> dict:
    """The images as the detector resizes them."""
    height, width = sample["visible"].shape[-2:]
    factor = min(SHORT / min(height, width), LONG / max(height, width))
    size = [int(side * factor) for side in (height, width)]
    images = {name: sample[name][None] for name in ("visible", "infrared")}
    if size != [height, width]:
        images = {name: interpolate(image, size, mode="bilinear") for name, image in images.items()}
    return sample | images


class PlainPipeline:
    """The usual way: PIL images all along, one tensor at the end."""

    def __init__(self, dataset: LLVIP):
        self.dataset, self.jitter = dataset, ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2)

    def __getitem__(self, index: int) -> dict:
        visible, infrared = (Image.open(path).convert("RGB") for path in self.dataset.pairs[index][:2])
        boxes = self.dataset.annotation(index).boxes.clone()
        if random.random() < 0.5:
            visible, infrared = v1.hflip(visible), v1.hflip(infrared)
            boxes[:, [0, 2]] = visible.width - boxes[:, [2, 0]]
        visible, infrared = v1.to_tensor(self.jitter(visible)), v1.to_tensor(infrared)
        infrared = (infrared * random.uniform(0.8, 1.2) + random.uniform(-0.05, 0.05)).clamp(0, 1)
        return {"visible": visible, "infrared": infrared, "boxes": boxes}


def write_pairs(root: Path, count: int) -> None:
    """Pairs in LLVIP's layout and size: drawn scenes, enlarged eight times."""
    for folder in ("visible/train", "infrared/train", "Annotations"):
        (root / folder).mkdir(parents=True)
    for index, sample in enumerate(map(SyntheticPairs(count, seed=0).__getitem__, range(count))):
        for modality in ("visible", "infrared"):
            image = Image.fromarray(sample[modality].permute(1, 2, 0).numpy())
            image = image.resize((1280, 1024), Image.Resampling.BICUBIC)
            image.save(root / modality / "train" / f"01{index:04d}.jpg", quality=90)
        boxes = [BOX.format(x1 + 1, y1 + 1, x2, y2) for x1, y1, x2, y2 in (8 * sample["boxes"]).int().tolist()]
        size = "<size><width>1280</width><height>1024</height></size>"
        (root / "Annotations" / f"01{index:04d}.xml").write_text(f"<annotation>{size}{''.join(boxes)}</annotation>")


def measure(dataset: LLVIP, count: int, rounds: int) -> list[str]:
    """The report's paragraphs on the first `count` pairs."""
    augmentation = PairedAugmentation(brightness=0.2, contrast=0.2, saturation=0.2, gain=0.2, offset=0.05)
    whole = AugmentedDataset(dataset, augmentation, seed=0)
    small = AugmentedDataset(dataset.decoded_at(SHORT), augmentation, seed=0)
    plain = PlainPipeline(dataset)
    functions = {
        "PIL + torchvision v1": lambda: [resized(plain[index]) for index in range(count)],
        "this project": lambda: [resized(whole[0, index]) for index in range(count)],
        f"this project, --decode-at {SHORT}": lambda: [resized(small[0, index]) for index in range(count)],
    }
    times = common.take_turns(functions, rounds)
    rival = times["PIL + torchvision v1"]
    rows = []
    for name, taken in times.items():
        seconds = statistics.median(taken) / count
        rows.append([name, f"{1000 * seconds:.1f}", f"{1 / seconds:.1f}", common.ratio(rival, taken)])
    height, width = dataset[0]["visible"].shape[-2:]
    kilobytes = statistics.mean(path.stat().st_size for i in range(count) for path in dataset.pairs[i][:2]) / 1024
    about = f"{count} pairs of {width} x {height} pixels, {kilobytes:.0f} KiB per image; medians of {rounds} rounds."
    return [about, common.table(["pipeline", "ms per pair", "pairs per second", "times as fast"], rows)]


def main() -> None:
    parser = common.make_parser(__doc__, rounds=9)
    parser.add_argument("--root", type=Path, help="LLVIP's folder (default: temporary files of its size)")
    parser.add_argument("--pairs", type=int, default=12, help="pairs per round (default: 12)")
    parser.set_defaults(threads=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        if args.root is None:
            write_pairs(Path(folder), args.pairs)
        dataset = LLVIP(args.root or folder, "train")
        paragraphs = measure(dataset, min(args.pairs, len(dataset)), args.rounds)
    files = "LLVIP's own files" if args.root else "temporary files"
    head = f"{common.machine(packages=('torchvision', 'Pillow'))}; {files}."
    name = f"data-{re.sub(r'[^a-z0-9]+', '-', common.processor().lower()).strip('-')}{'-llvip' if args.root else ''}"
    common.finish(["# Loading pairs", head, *paragraphs], name, args.write)


if __name__ == "__main__":
    main()
