"""The two halves meet in a file: what a detector finds, an FG-CLIP names the colour of; each is trained a little."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou
from torchvision.transforms.v2.functional import to_pil_image

import train_fgclip
import train_stage1
from fgclip import score
from fgclip.synthetic import COLOURS, PHRASES, SyntheticRegions
from macl import predict

DETECTOR = (
    "--backbone resnet18 --statistics measured --fpn-channels 32 --fpn-levels 3 --anchor-sizes 16,24,32 "
    "--aspect-ratios 1 --head-width 64 --rpn-pre-nms 100 50 --rpn-post-nms 50 25 --roi-samples 32 --rpn-samples 64 "
    "--min-size 64 --macl-level none --merge none --batch-size 8 --workers 0 --device cpu --optimizer adamw --lr 0.002 "
    "--schedule cosine --warmup-steps 10 --lr-base-batch 8 --ema-decay 0.9 --epochs 2 --validate-every 9"
)
CLIP = (
    "--placement free --vision-width 64 --vision-layers 2 --vision-heads 4 --text-width 64 --text-layers 2 "
    "--text-heads 4 --embed-dim 32 --synthetic-train 4000 --synthetic-val 8 --batch-size 8 --lr 0.003 "
    "--warmup-steps 10 --workers 0 --device cpu --max-steps 100"
)


def write(folder: Path, count: int, seed: int) -> SyntheticRegions:
    """Scenes of coloured shapes as pairs in YOLO's form, one class: infrared is the grey picture."""
    scenes = SyntheticRegions(count, seed=seed, placement="free")
    for name in ("visible", "infrared", "labels"):
        (folder / name).mkdir(parents=True)
    for index in range(count):
        picture = to_pil_image(scenes.picture(index))
        picture.save(folder / "visible" / f"{index}.png")
        picture.convert("L").save(folder / "infrared" / f"{index}.png")
        boxes = np.array(scenes.plan(index)[0])
        boxes = np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], axis=1)
        lines = [" ".join(["0", *(f"{side:.4f}" for side in box)]) for box in boxes]
        (folder / "labels" / f"{index}.txt").write_text("\n".join(lines))
    return scenes


@pytest.mark.slow
def test_the_colour_of_what_was_found(tmp_path):
    """Of eight colours one is right by chance; here nine in ten are."""
    write(tmp_path / "train", 400, 1)
    scenes = write(tmp_path / "new", 24, 2)
    places = {
        name: f"--visible {tmp_path / name}/visible --infrared {tmp_path / name}/infrared" for name in ("train", "new")
    }
    train_stage1.main(f"{places['train']} --labels {tmp_path}/train/labels --output {tmp_path}/det {DETECTOR}".split())
    train_fgclip.main(f"{CLIP} --output {tmp_path}/clip".split())
    predict.main(f"--checkpoint {tmp_path}/det/last.pt {places['new']} --output {tmp_path}/out --device cpu".split())
    (tmp_path / "phrases.txt").write_text("\n".join(PHRASES))
    flags = f"--detections {tmp_path}/out/detections.json --text-file {tmp_path}/phrases.txt --output {tmp_path}/said"
    score.main(f"--checkpoint {tmp_path}/clip/last.pt {flags} --device cpu".split())

    right, objects = [], 0
    for row in json.loads((tmp_path / "said/detections.json").read_text()):
        boxes, kinds = scenes.plan(int(Path(row["image"]).stem))
        objects += len(kinds)
        for one in row["detections"]:
            overlaps = box_iou(torch.tensor([one["box"]], dtype=torch.float64), torch.tensor(boxes) * 64)[0]
            if overlaps.max() > 0.5:
                said = one["phrases"][0]["phrase"].split()[1]
                assert said in COLOURS
                right.append(said == kinds[int(overlaps.argmax())][0])
    assert len(right) > 0.8 * objects and np.mean(right) > 0.8, (len(right), objects, np.mean(right))
