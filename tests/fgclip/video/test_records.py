"""Data sets of videos: published lists and annotation, folders of classes, tracks, and what is said of mistakes."""

import shutil

import numpy as np
import pytest

from fgclip.video.records import Track, VideoRecord, hold_out, read_videos
from trainkit.errors import InputError


def tree(root, *names, **texts):
    """Files that are no videos, but have their names, and texts."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    for name, text in texts.items():
        (root / f"{name}.txt").write_text(text)
    return root


def positives(videos, rate, counts=None):
    """Frames of events, of videos of so many frames."""
    ends = {record.name: (counts or {}).get(record.name, 10**6) for record in videos.records}
    spans = [(round(s * rate), round(e * rate), ends[r.name]) for r in videos.records for s, e, _ in r.events]
    return sum(min(end, count) - start for start, end, count in spans)


def names(videos):
    return [record.name for record in videos.records]


def refusal(*arguments):
    with pytest.raises(InputError) as refused:
        read_videos(*arguments)
    return str(refused.value)


def test_the_official_counts_of_ucf_crime(shared, tmp_path):
    published = shared / "data/video/ucf_crime"
    train, test = (read_videos(published, "ucf-crime", split) for split in ("train", "test"))
    assert len(train) == 1610 and sum(bool(record.classes) for record in train.records) == 810
    assert len(test) == 290 == len(test.missing) and sum(bool(record.classes) for record in test.records) == 140
    assert test.test_names == train.test_names == set(names(test)) and not test.test_names & set(names(train))
    assert len(test.classes) == 13 and test.classes == train.classes == tuple(sorted(test.classes))
    assert {record.events for record in train.records} == {None, ()}
    lines = (published / "test_with_frame_counts.txt").read_text().split("\n")
    counts = {line.split()[0].split("/")[1][:-4]: int(line.split()[1]) for line in lines if line.strip()}
    assert sum(counts.values()) == 1_111_808
    assert positives(test, 30, counts) == 84_182
    assert sum(len(record.events) for record in test.records) == 140 + 16
    said = dict(zip(names(test), test.records, strict=True))
    for spelling in (*published.glob("Temporal_*.txt"), published / "test_with_frame_counts.txt"):
        root = tmp_path / spelling.stem / "lists"
        root.mkdir(parents=True)
        for path in (spelling, published / "Anomaly_Test.txt"):
            shutil.copy(path, root)
        assert {record.name: record for record in read_videos(root.parent, "ucf-crime", "test").records} == said


def test_the_official_counts_of_xd_violence(shared, tmp_path):
    published = shared / "data/video/xd_violence"
    test = read_videos(published, "xd-violence", "test")
    assert len(test) == 500 and {event[2] for r in test.records for event in r.events} == set(test.classes)
    shutil.copy(published / "annotations.txt", tmp_path)
    plain = read_videos(tmp_path, "xd-violence", "test")
    assert positives(plain, 24) == 538_324 and names(test) == names(plain)
    assert all(event[2] in (*record.classes, "") for record in plain.records for event in record.events)
    files = ("train/x__#1_label_B1-0-G.mp4", "train/y_label_A.mp4", "test/z_label_A.mp4", f"test/{names(test)[0]}.mp4")
    tree(tmp_path, *files)
    train, test = (read_videos(tmp_path, "xd-violence", split) for split in ("train", "test"))
    first, second = train.records
    assert (first.source, first.classes, first.events) == ("x", ("fighting", "explosion"), None)
    assert second.classes == second.events == ()
    assert len(test) == 501 and len(test.missing) == 499 and "y_label_A" not in test.test_names


UCF = dict(Anomaly_Train="Arson/A1.mp4\nTraining_Normal/N1.mp4", Anomaly_Test="Arson/A2.mp4\nTesting_Normal/N2.mp4")
TIMES = "Temporal_Anomaly_Annotation"
UCF[TIMES] = "A2.mp4  Arson  15  31  40  50  \nN2.mp4  Normal  -1  -1  -1  -1  "


def test_videos_are_found_by_name_below_the_root(tmp_path):
    files = ("part 1/Arson/A1.mp4", "part 1/Arson/A10.mp4", "part 2/N1.avi", "other/N1.avi", "x/A2/001.png")
    tree(tmp_path, *files, **UCF)
    (tmp_path / "other/N1.avi").write_text((tmp_path / "part 2/N1.avi").read_text())
    (tmp_path / "loop").symlink_to(tmp_path)
    train, test = (read_videos(tmp_path, "ucf-crime", split) for split in ("train", "test"))
    found = [r.path and str(r.path.relative_to(tmp_path)) for r in train.records]
    assert found == ["part 1/Arson/A1.mp4", "other/N1.avi"]
    assert test.records[0].path == tmp_path / "x/A2" and test.missing == ["N2"] and not test.notes
    assert train.notes == ("1 videos have equal copies, which are not read: N1",)
    assert test.records[0].events == ((0.5, 31 / 30, "Arson"), (40 / 30, 50 / 30, "Arson"))
    with pytest.raises(InputError, match="N2: no such video was found"):
        test.open(test.records[1])


def test_folders_of_classes(tmp_path):
    files = ("fire/a.mp4", "fire/b.v2.mp4", "Normal/c.mkv", "Abnormal/d/1.jpg")
    for root in (
        tree(tmp_path / "flat", *files),
        tree(tmp_path / "split", *(f"train/{f}" for f in files), "test/fire/e.mp4"),
    ):
        train = read_videos(root, "folders", "train")
        found = {record.name: (record.classes, record.events) for record in train.records}
        assert found == {"a": (("fire",), None), "b.v2": (("fire",), None), "c": ((), ()), "d": (("Abnormal",), None)}
        assert train.classes == ("Abnormal", "fire") and train.test_names == ({"e"} if root.name == "split" else set())
    assert names(read_videos(tmp_path / "split", "folders", "test")) == ["e"]


@pytest.mark.parametrize(
    ("format", "files", "texts", "words"),
    [
        ("ucf-crime", (), {}, "holds no Anomaly_Test.txt with Anomaly_Train.txt"),
        ("ucf-crime", (), UCF | dict(Anomaly_Train="Arson/A2.mp4"), "1 videos of Anomaly_Test.txt are in Anomaly_Tra"),
        ("ucf-crime", (), UCF | dict(Anomaly_Train="Arson/A1.mp4"), "every training video is anomalous"),
        ("ucf-crime", (), UCF | dict(Anomaly_Test="A2.mp4"), "Anomaly_Test.txt: expected CLASS/NAME.mp4, got 'A2.mp4'"),
        ("ucf-crime", (), UCF | {TIMES: "A2 Arson 1 -x"}, f"{TIMES}.txt, A2: expected a whole number"),
        ("ucf-crime", (), UCF | {TIMES: "A2 Arson 1"}, "A2: expected pairs of frames"),
        ("ucf-crime", (), UCF | dict(Anomaly_Test=""), "Anomaly_Test.txt is empty"),
        ("ucf-crime", ("Abuse/A1.mp4", "A1/A1.avi"), UCF, "the name A1 belongs to two videos"),
        ("xd-violence", (), {}, "holds no annotations.txt or annotations_multiclasses.txt"),
        ("xd-violence", (), dict(annotations="a_label_G-0-0 1 2 3"), "a_label_G-0-0: expected pairs of frames"),
        ("folders", ("a.mp4",), {}, "a.mp4 lies in no folder of a class"),
        ("folders", ("test/fire/a.mp4",), {}, "holds no folder train; expected train/CLASS/VIDEO beside test"),
        ("folders", ("fire/a.mp4", "theft/a.avi"), {}, "the name a belongs to two videos"),
        ("folders", ("Normal/a.mp4",), {}, "every training video is normal"),
        ("folders", (), {}, "holds no videos to train with"),
    ],
)  # fmt: skip
def test_mistakes_of_layout_are_one_sentence(tmp_path, format, files, texts, words):
    assert words in refusal(tree(tmp_path, *files, **texts), format, "train")
    assert "none is not a folder" in refusal(tmp_path / "none", "folders", "train")


def test_a_track_has_boxes_within_its_stretches():
    keys = np.array([1.0, 2.0]), np.array([[0.0, 0, 0.2, 0.2], [0.5, 0.5, 1, 1]])
    track = Track((keys, (np.array([4.0]), keys[1][:1])))
    assert track.spans == [(1.0, 2.0), (4.0, 4.0)] and all(track.box_at(time) is None for time in (0.5, 2.25, 3.0))
    boxes = [track.box_at(time) for time in (1.0, 1.5, 4.0)]
    np.testing.assert_allclose(boxes, [[0, 0, 0.2, 0.2], [0.25, 0.25, 0.6, 0.6], [0, 0, 0.2, 0.2]])
    boxes = [track.box_at(time, margin=0.25) for time in (0.5, 0.74, 0.75, 2.25, 3.8)]
    assert [box is None for box in boxes] == [True, True, False, False, False] and [*boxes[3]] == [0.5, 0.5, 1, 1]


def test_a_share_of_each_class_is_held_out(tmp_path):
    counts = dict(fire=20, theft=2, normal=10, rare=1)
    files = [f"{kind}/{kind}{i}.mp4" for kind, count in counts.items() for i in range(count)]
    videos = read_videos(tree(tmp_path, *files), "folders", "train")
    train, held = hold_out(videos, 0.1, 0)
    kinds = [record.name.rstrip("0123456789") for record in held.records]
    assert sorted(kinds) == ["fire", "fire", "normal", "theft"] and sorted(names(train) + names(held)) == sorted(
        names(videos)
    )
    assert names(hold_out(videos, 0.1, 0)[1]) == names(held) != names(hold_out(videos, 0.1, 1)[1])
    videos.records = [VideoRecord(f"a{i}", classes=("fire",), source=f"s{i // 5}") for i in range(20)]
    assert len({record.source for record in hold_out(videos, 0.25, 0)[1].records}) == 1
