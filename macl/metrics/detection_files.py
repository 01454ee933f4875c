"""Detection files in the formats of the KAIST benchmark: lines of text, or a list of COCO results."""

import json
import os
from pathlib import Path

import torch

from macl.metrics.frames import flatten_boxes, flatten_values
from trainkit.errors import InputError
from trainkit.files import MAX_COORDINATE, MAX_ID, number, numbers, read_json, read_text, shown, write_text


def read_detections(path: str | os.PathLike, image_count: int, *, first_id: int | None = None) -> list[dict]:
    """Detections of ``image_count`` frames from a file of somebody else's.

    * ``.txt``: one detection a line, ``image_id,x,y,width,height,score``, ids from 1.
    * ``.json``: a list of {"image_id", "bbox": [x, y, width, height], "score"} and, where given, "category_id", which
      becomes the label. Ids count from 1, or from 0 if an id of 0 occurs: both are about.

    ``first_id`` (0 or 1) settles what the ids count from. Returns one dict a frame, in order, of boxes (N, 4)
    x1, y1, x2, y2 float64, labels (N,) int64 and scores (N,) float64, as the file orders them; frames that are not
    named have no rows. Raises InputError, naming file and place, for a missing file, another format, ids out of range,
    negative sizes and values that are not finite.
    """
    path = Path(path)
    rows = _READERS[_suffix(path)](path)
    if first_id is None:
        first_id = _first_id(path, rows)
    frames = [[] for _ in range(image_count)]
    for place, image_id, *values in rows:
        if not first_id <= image_id < first_id + image_count:
            raise InputError(
                f"{path}, {place}: image id {image_id} is out of range, "
                f"expected {first_id} to {first_id + image_count - 1} for {image_count} frames"
            )
        frames[image_id - first_id].append(values)
    return [_frame(rows) for rows in frames]


def could_count_from_zero(path: str | os.PathLike, image_count: int) -> bool:
    """Whether read_detections takes the ids of a json to count from 1 although all of them fit counting from 0 too."""
    path = Path(path)
    if _suffix(path) != ".json":
        return False
    rows = _read_json(path)
    return _first_id(path, rows) == 1 and all(row[1] < image_count for row in rows)


def write_detections(path: str | os.PathLike, detections: list[dict], *, first_id: int = 1) -> None:
    """Write ``detections`` (one dict a frame: boxes (N, 4) x1, y1, x2, y2, scores (N,), labels (N,) or none) as
    ``.txt`` or ``.json``; the formats are read_detections' and numbers keep nine digits.

    The file appears whole or not at all. Labels are kept by json alone. Raises InputError for another suffix and for a
    place that cannot be written.
    """
    path = Path(path)
    suffix = _suffix(path)
    boxes, frame = flatten_boxes(detections)
    scores = flatten_values(detections, "scores", frame)
    rows = [
        (index + first_id, *(float(f"{value:.9g}") for value in (*box, score)))
        for index, box, score in zip(frame.tolist(), boxes.tolist(), scores.tolist(), strict=True)
    ]
    if suffix == ".txt":
        text = "".join(",".join(f"{value:.9g}" for value in row) + "\n" for row in rows)
    else:
        labelled = all("labels" in item for item in detections)
        labels = flatten_values(detections, "labels", frame).astype(int).tolist() if labelled else [1] * len(rows)
        text = json.dumps(
            [
                {"image_id": image_id, "category_id": label, "bbox": box, "score": score}
                for (image_id, *box, score), label in zip(rows, labels, strict=True)
            ]
        )
    write_text(path, text)


def _suffix(path: Path) -> str:
    if path.suffix not in _READERS:
        raise InputError(f"{path}: detections are .txt or .json files")
    return path.suffix


def _first_id(path: Path, rows: list[tuple]) -> int:
    return 0 if path.suffix == ".json" and any(row[1] == 0 for row in rows) else 1


def _read_txt(path: Path) -> list[tuple]:
    lines = read_text(path, "a file of detections").split("\n")
    rows = []
    for count, line in enumerate(lines, 1):
        if line.strip():
            place = f"line {count}"
            values = numbers(line.split(","), f"{path}, {place} (image_id,x,y,width,height,score)", 6, -MAX_ID, MAX_ID)
            rows.append(_row(path, place, values[0], values[1:5], values[5], 1))
    return rows


def _read_json(path: Path) -> list[tuple]:
    rows = []
    for index, record in enumerate(read_json(path, "a file of detections", list)):
        place = f"entry {index}"
        if not isinstance(record, dict):
            raise InputError(f"{path}, {place}: expected image_id, bbox and score, got {shown(record)}")
        values = (record.get(key) for key in ("image_id", "bbox", "score"))
        rows.append(_row(path, place, *values, record.get("category_id", 1)))
    return rows


def _row(path: Path, place: str, image_id, box, score, label) -> tuple:
    where = f"{path}, {place}"
    x, y, width, height = numbers(box, f"{where}, bbox (x, y, width, height)")
    width, height = (number(side, f"{where}, width or height", 0, MAX_COORDINATE) for side in (width, height))
    image_id, label = (
        number(value, f"{where}, {key}", 0, MAX_ID, whole=True)
        for key, value in (("image_id", image_id), ("category_id", label))
    )
    return place, image_id, x, y, width, height, number(score, f"{where}, score"), label


def _frame(rows: list) -> dict:
    values = torch.tensor(rows, dtype=torch.float64).reshape(-1, 6)  # (N, 6) x, y, width, height, score, label
    return {
        "boxes": torch.cat([values[:, :2], values[:, :2] + values[:, 2:4]], 1),
        "labels": values[:, 5].long(),
        "scores": values[:, 4],
    }


_READERS = {".txt": _read_txt, ".json": _read_json}
