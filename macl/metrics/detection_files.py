"""Detection files in the formats of the KAIST benchmark: lines of text, or a list of COCO results."""

import json
from pathlib import Path

import torch

from macl.metrics.frames import flatten
from trainkit.errors import InputError
from trainkit.files import MAX_COORDINATE, MAX_ID, number, numbers, read_json, read_text, shown, write_text


def read_detections(path: str | Path, image_count: int, *, first_id: int | None = None) -> list[dict]:
    """Detections of `image_count` frames from a file.

    .txt: per line `image_id,x,y,width,height,score`, ids from 1
    .json: a list of {"image_id", "bbox": [x, y, width, height], "score"} and, where given, "category_id", the label;
        ids from 1, or from 0 if an id of 0 occurs
    first_id: 0 or 1 settles what the ids count from

    Returns one dict per frame: boxes (N, 4) x1, y1, x2, y2 float64, labels (N,) int64, scores (N,) float64, in the
    file's order. Raises InputError, with file and place, for whatever else stands there.
    """
    rows = _read_rows(Path(path))
    if first_id is None:
        first_id = 0 if Path(path).suffix == ".json" and any(row[1] == 0 for row in rows) else 1
    frames = [[] for _ in range(image_count)]
    for place, image_id, *values in rows:
        if not first_id <= image_id < first_id + image_count:
            ids = f"{first_id} to {first_id + image_count - 1}"
            raise InputError(f"{place}: image id {image_id} is out of range, expected {ids} for {image_count} frames")
        frames[image_id - first_id].append(values)
    detections = []
    for rows in frames:
        values = torch.tensor(rows, dtype=torch.float64).reshape(-1, 6)  # (N, 6) x, y, width, height, score, label
        boxes = torch.cat([values[:, :2], values[:, :2] + values[:, 2:4]], 1)
        detections.append({"boxes": boxes, "labels": values[:, 5].long(), "scores": values[:, 4]})
    return detections


def could_count_from_zero(path: str | Path, image_count: int) -> bool:
    """Whether the ids of a json, which read_detections counts from 1, would fit counting from 0 as well."""
    return Path(path).suffix == ".json" and all(0 < row[1] < image_count for row in _read_rows(Path(path)))


def write_detections(
    path: str | Path, detections: list[dict], image_ids: list | None = None, category_ids: list | None = None
) -> None:
    """Write one dict per frame (boxes (N, 4) x1, y1, x2, y2, scores (N,), labels (N,)) as read_detections reads it.

    Ids count from 1, numbers keep nine digits, and .txt has no labels; any other name is json. Raises InputError.
    image_ids, category_ids: what json names the frames and the labels 1, 2, ... instead; of None a label is left out
    """
    boxes, frame, scores, labels = flatten(detections, "scores", "labels")
    rows = []
    for index, box, score, label in zip(frame.tolist(), boxes.tolist(), scores.tolist(), labels.tolist(), strict=True):
        *box, score = (float(f"{value:.9g}") for value in (*box, score))
        image = index + 1 if image_ids is None else image_ids[index]
        category = int(label) if category_ids is None else category_ids[int(label) - 1]
        if category is not None:
            rows.append({"image_id": image, "category_id": category, "bbox": box, "score": score})
    text = json.dumps(rows)
    if Path(path).suffix == ".txt":
        lines = ((row["image_id"], *row["bbox"], row["score"]) for row in rows)
        text = "".join(",".join(f"{value:.9g}" for value in line) + "\n" for line in lines)
    write_text(path, text)


def _read_rows(path: Path) -> list[tuple]:
    """Per detection its place for a message, image_id, x, y, width, height, score, label."""
    rows = []
    if path.suffix == ".txt":
        for count, line in enumerate(read_text(path, "a file of detections").split("\n"), 1):
            if line.strip():
                place = f"{path}, line {count}"
                values = numbers(line.split(","), f"{place} (image_id,x,y,width,height,score)", 6, -MAX_ID, MAX_ID)
                rows.append(_row(place, values[0], values[1:5], values[5], 1))
    elif path.suffix == ".json":
        for index, record in enumerate(read_json(path, "a file of detections", list)):
            place = f"{path}, entry {index}"
            if not isinstance(record, dict):
                raise InputError(f"{place}: expected image_id, bbox and score, got {shown(record)}")
            values = (record.get(key) for key in ("image_id", "bbox", "score"))
            rows.append(_row(place, *values, record.get("category_id", 1)))
    else:
        raise InputError(f"{path}: detections are .txt or .json files")
    return rows


def _row(place: str, image_id, box, score, label) -> tuple:
    x, y, *sides = numbers(box, f"{place}, bbox (x, y, width, height)")
    sides = [number(side, f"{place}, width or height", 0, MAX_COORDINATE) for side in sides]
    image_id = number(image_id, f"{place}, image_id", 0, MAX_ID, whole=True)
    label = number(label, f"{place}, category_id", 0, MAX_ID, whole=True)
    return place, image_id, x, y, *sides, number(score, f"{place}, score"), label
