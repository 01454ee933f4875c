"""Detection files: read, written, and refused with a sentence that names the place."""

import json

import pytest
import torch

from macl.metrics import read_detections, write_detections
from trainkit.errors import InputError


def sample():
    torch.manual_seed(0)
    frames = []
    for count in (2, 0, 3):
        corner = torch.rand(count, 2) * 100
        boxes = torch.cat([corner, corner + 1 + torch.rand(count, 2) * 50], 1)
        frames.append({"boxes": boxes, "labels": torch.ones(count, dtype=torch.int64), "scores": torch.rand(count)})
    return frames


@pytest.mark.parametrize("suffix", [".txt", ".json"])
def test_what_is_written_is_read(tmp_path, suffix):
    path = tmp_path / f"detections{suffix}"
    write_detections(path, sample())
    read = read_detections(path, 3)
    for written, back in zip(sample(), read, strict=True):
        torch.testing.assert_close(back["boxes"], written["boxes"].double(), rtol=0, atol=1e-6)
        torch.testing.assert_close(back["scores"], written["scores"].double(), rtol=0, atol=1e-8)
        assert torch.equal(back["labels"], written["labels"])
    again = tmp_path / f"again{suffix}"
    write_detections(again, read)
    assert again.read_text() == path.read_text()
    assert sorted(item.name for item in tmp_path.iterdir()) == sorted([again.name, path.name])


def test_text_lines_count_frames_from_one(tmp_path):
    path = tmp_path / "detections.txt"
    path.write_bytes(b"\xef\xbb\xbf2,10,20,30,40,0.5\r\n\n2,1.5,2,3,4,0.75\r\n")  # as Windows writes it
    empty, frame = read_detections(path, 2)
    assert empty["boxes"].shape == (0, 4) and empty["scores"].shape == (0,)
    assert frame["boxes"].tolist() == [[10, 20, 40, 60], [1.5, 2, 4.5, 6]] and frame["scores"].tolist() == [0.5, 0.75]


def test_json_may_count_from_zero(tmp_path):
    path = tmp_path / "detections.json"
    entry = {"bbox": [1, 2, 3, 4], "score": 0.5}
    path.write_text(json.dumps([{"image_id": 0, "category_id": 2, **entry}, {"image_id": 1, **entry}]))
    assert [frame["labels"].tolist() for frame in read_detections(path, 2)] == [[2], [1]]
    path.write_text(json.dumps([{"image_id": 1, **entry}]))
    assert [len(frame["labels"]) for frame in read_detections(path, 2)] == [1, 0]
    assert [len(frame["labels"]) for frame in read_detections(path, 2, first_id=0)] == [0, 1]
    write_detections(path, [{"boxes": [[0, 0, 1, 1]], "scores": [0.5], "labels": [3]}])
    assert read_detections(path, 1)[0]["labels"].tolist() == [3]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", "1,1,1,1,1,0.5\n3,1,1,1,1,0.5\n", "line 2: image id 3 is out of range, expected 1 to 2 for 2 frames"),
        ("a.txt", "1,1,1,1,0.5\n", r"line 1 \(image_id,x,y,width,height,score\): expected"),
        ("a.txt", "1,1,1,1,1,nan\n", r"line 1 .*: expected a number"),
        ("a.txt", "1.5,1,1,1,1,1\n", "line 1, image_id: expected a whole number"),
        ("a.json", "{", "is not valid JSON"),
        ("a.json", "{}", "holds {}; expected a file of detections, a list"),
        ("a.json", "[3]", "entry 0: expected image_id"),
        ("a.json", '[{"image_id": 1, "bbox": [1, 2, 3], "score": 1}]', "entry 0, bbox .*: expected"),
        ("a.json", '[{"image_id": 1, "bbox": [1, 2, 3, Infinity], "score": 1}]', "entry 0, bbox .*: expected a number"),
        ("a.txt", "1,1,1,-4,5,0.5\n", "line 1, width or height: expected a number from 0"),
        ("a.json", '[{"image_id": 1, "bbox": [1, 2, 3, 4], "score": true}]', "entry 0, score"),
        ("a.json", '[{"image_id": 1, "bbox": [1, 2, 3, 4], "score": 1, "category_id": 1e39}]', "entry 0, category_id"),
        ("a.csv", "", "detections are .txt or .json files"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(InputError, match=f"{name}.*{message}"):
        read_detections(path, 2)


def test_places_that_cannot_be_read_or_written(tmp_path):
    with pytest.raises(InputError, match=r"missing\.txt does not exist"):
        read_detections(tmp_path / "missing.txt", 2)
    with pytest.raises(InputError, match="cannot be written"):
        write_detections(tmp_path / "missing" / "a.txt", sample())
