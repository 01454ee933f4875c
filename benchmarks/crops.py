"""Does contrast between the cameras learn identity where no surroundings help? Cut-out pairs of the same thing.

    python benchmarks/crops.py --root flir_crops --steps 1000            # {train,val}/{visible,infrared}/CLASS/NAME.jpg

Backbone, neck and contrastive head of the detector (macl_level "crop") are trained on pairs of crops alone, from random
weights, and retrieve among the crops of val. Arms: keys of this step, with a batch of 16 and a larger one; keys of a
moving average; the same with the 8 hardest of a memory bank.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import trainkit.process_setup  # noqa: F401  before torch

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

import macl
from benchmarks import common
from macl.data.sample import read_image
from macl.detector import CROP
from macl.metrics import alignment
from trainkit.optimizer import ema

ARMS = {"batch 16": (16, False, 0), "batch 128": (128, False, 0), "averaged keys": (16, True, 0)}
ARMS |= {"averaged keys, DHN": (16, True, 512), "averaged keys, DHN, batch 128": (128, True, 4096)}
MODALITIES = ("visible", "infrared")


def read(folder: Path) -> tuple[Tensor, list[str]]:
    """Crops (N, 2, 3, h, w) uint8, an eighth larger than CROP for augmentation, and their classes."""
    names = sorted(path.relative_to(folder / "visible") for path in folder.glob("visible/*/*.jpg"))
    size = [side + side // 8 for side in CROP]
    pairs = [[vision.resize(read_image(folder / m / name), size) for m in MODALITIES] for name in names]
    return torch.stack([torch.stack(pair) for pair in pairs]), [name.parts[0] for name in names]


def augmented(crops: Tensor) -> list[Tensor]:
    """Both modalities (B, 3, *CROP) in 0..1, flipped together, shifted and brightened each on its own."""
    crops = torch.where(torch.rand(len(crops), 1, 1, 1, 1, device=crops.device) < 0.5, crops.flip(-1), crops)
    views = []
    for view in crops.unbind(1):
        top, left = (int(torch.randint(view.shape[2 + axis] - CROP[axis] + 1, ())) for axis in range(2))
        view = view[:, :, top : top + CROP[0], left : left + CROP[1]] / 255
        views.append((view * (0.7 + 0.6 * torch.rand(len(view), 1, 1, 1, device=view.device))).clamp(max=1))
    return views


def embed(detector, views: list[Tensor], project: bool = True) -> list[Tensor]:
    """Embeddings (B, D) of both modalities; without project the inputs of the head."""
    batch = torch.cat([(view - view.mean()) / view.std() for view in views])
    maps = detector.neck(detector.backbone(batch, [(name, len(views[0])) for name in MODALITIES]))
    rows = maps[1].flatten(1).chunk(2)
    return [detector.macl.embed(part) if project else part for part in rows]


def recall(detector, crops: Tensor, rows: list[int]) -> float:
    """R@1 in percent among the given rows."""
    detector.eval()
    margins = [side // 16 for side in CROP]
    views = crops[:, :, :, margins[0] :, margins[1] :][..., : CROP[0], : CROP[1]] / 255
    with torch.no_grad():
        parts = [embed(detector, list(part.unbind(1))) for part in views.split(128)]
    visible, infrared = (torch.cat(part)[rows].cpu() for part in zip(*parts, strict=True))
    return 100 * alignment(visible, infrared)["r1"]


def run(arm: str, seed: int, args: argparse.Namespace, train: Tensor, val: Tensor, people: list[int]) -> list[float]:
    """R@1 of all crops and of people after training."""
    batch, averaged, bank = ARMS[arm]
    torch.manual_seed(seed)
    detector = macl.build_detector(
        backbone="resnet18", norm="group", fpn_channels=64, fpn_levels=3, head_width=8, macl_level="crop",
        macl_hidden=(256,), macl_temperature=0.2, dhn_size=bank,
    ).to(args.device).train()  # fmt: skip
    parameters = [*detector.backbone.parameters(), *detector.neck.parameters(), *detector.macl.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=args.steps)
    average = ema(detector, 0.99)
    for _ in range(args.steps):
        rows = torch.randint(len(train), (batch,), device=args.device)
        views, keys = augmented(train[rows]), None
        if averaged:
            with torch.no_grad():
                keys = dict(zip(MODALITIES, embed(average.module.eval(), views), strict=True))
        loss, _ = detector.macl(*embed(detector, views, project=False), rows, keys)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(detector)
    return [recall(average.module, val, chosen) for chosen in (list(range(len(val))), people)]


def main() -> None:
    parser = common.make_parser(__doc__, rounds=5)
    parser.add_argument("--root", type=Path, required=True, help="folder of the crops")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS), help="default: all")
    parser.add_argument("--steps", type=int, default=1000, help="of training (default: 1000)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    (train, _), (val, classes) = (read(args.root / name) for name in ("train", "val"))
    train, val = train.to(args.device), val.to(args.device)
    people, rows = [row for row, name in enumerate(classes) if name == "person"], []
    for arm in args.arms:
        found = [run(arm, seed, args, train, val, people) for seed in range(args.rounds)]
        means = torch.tensor(found)
        cells = [f"{mean:.1f} ± {std:.1f}" for mean, std in zip(means.mean(0), means.std(0), strict=True)]
        rows.append([arm, str(args.rounds), *cells])
        print(*rows[-1], sep="  ", flush=True)
    head = f"{len(train)} pairs of training, {args.steps} steps; {common.machine(args.device)}"
    note = "R@1 in percent, mean and standard deviation over seeds; "
    note += f"chance {100 / len(val):.1f} and {100 / len(people):.1f}"
    table = common.table(["arm", "seeds", f"all {len(val)}", f"{len(people)} people"], rows)
    common.finish(["# Crops of two cameras", head, note, table], f"crops-{args.device}", args.write)


if __name__ == "__main__":
    main()
