"""Detection files in the formats of the KAIST benchmark: lines of text, or a list of COCO results."""

import json
import math
import os
from pathlib import Path

import torch

from macl.errors import InputError
from macl.metrics.frames import flatten_boxes, flatten_values


def read_detections(path: str | os.PathLike, image_count: int, *, first_id: int | None = None) -> list[dict]:
    """Detections of ``image_count`` frames from a file of somebody else's.

    * ``.txt``: one detection a line, ``image_id,x,y,width,height,score``, ids from 1.
    * ``.json``: a list of {"image_id", "bbox": [x, y, width, height], "score"} and, where given, "category_id", which
      becomes the label. Ids count from 1, or from 0 if an id of 0 occurs: both are about.

    ``first_id`` (0 or 1) settles what the ids count from. Returns one dict a frame, in order, of boxes (N, 4)
    x1, y1, x2, y2 float64, labels (N,) int64 and scores (N,) float64, as the file orders them; frames that are not
    named have no rows. Raises InputError, naming file and place, for a missing file, another format, ids out of range
    and values that are not finite.
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
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text)
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error})") from error
    finally:
        partial.unlink(missing_ok=True)


def _suffix(path: Path) -> str:
    if path.suffix not in _READERS:
        raise InputError(f"{path}: detections are .txt or .json files")
    return path.suffix


def _first_id(path: Path, rows: list[tuple]) -> int:
    return 0 if path.suffix == ".json" and any(row[1] == 0 for row in rows) else 1


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a file of detections ({error})") from error


def _read_txt(path: Path) -> list[tuple]:
    rows = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        place = f"line {number}"
        try:
            values = [float(value) for value in line.split(",")]
        except ValueError:
            values = []
        if len(values) != 6:
            raise InputError(
                f"{path}, {place}: expected six numbers image_id,x,y,width,height,score, got {line[:80]!r}"
            )
        rows.append(_row(path, place, *values, 1))
    return rows


def _read_json(path: Path) -> list[tuple]:
    try:
        records = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: is not json ({error})") from error
    if not isinstance(records, list):
        raise InputError(f"{path}: expected a list of detections, got {type(records).__name__}")
    rows = []
    for index, record in enumerate(records):
        place = f"entry {index}"
        try:
            x, y, width, height = map(float, record["bbox"])
            values = float(record["image_id"]), x, y, width, height, float(record["score"])
            label = int(record.get("category_id", 1))
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise InputError(
                f"{path}, {place}: expected image_id, bbox [x, y, width, height] and score as numbers, "
                f"got {json.dumps(record)[:120]}"
            ) from error
        rows.append(_row(path, place, *values, label))
    return rows


def _row(path, place, image_id, x, y, width, height, score, label) -> tuple:
    if not all(map(math.isfinite, (image_id, x, y, width, height, score))):
        raise InputError(f"{path}, {place}: expected finite numbers")
    if image_id != int(image_id):
        raise InputError(f"{path}, {place}: expected a whole number for the image id, got {image_id}")
    return place, int(image_id), x, y, width, height, score, label


def _frame(rows: list) -> dict:
    values = torch.tensor(rows, dtype=torch.float64).reshape(-1, 6)  # (N, 6) x, y, width, height, score, label
    return {
        "boxes": torch.cat([values[:, :2], values[:, :2] + values[:, 2:4]], 1),
        "labels": values[:, 5].long(),
        "scores": values[:, 4],
    }


_READERS = {".txt": _read_txt, ".json": _read_json}
