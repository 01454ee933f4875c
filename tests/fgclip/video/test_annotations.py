"""Tracks and sentences of other files: their forms, their times, and what is said when they meet the videos."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from mutants import hunt
from videos import write_video

from fgclip.video.annotations import add_annotations, read_sentences, read_tracks
from fgclip.video.records import VideoRecord, VideoSet, read_videos
from trainkit.errors import InputError

BOX = [0.1, 0.2, 0.5, 0.6]
FIGHT = VideoRecord("Fight1", None, ("Fighting",))
SET = VideoSet([FIGHT, VideoRecord("Calm1", None, (), ())], ("Fighting",), frozenset({"Fight2"}))


def item(*frames, video="Fighting/Fight1.mp4", **changes):
    """An item of a list with one track."""
    keys = [frame if isinstance(frame, dict) else dict(frame=frame, bbox=BOX) for frame in frames]
    return dict(video=video, region_captions=["a man"], box_infos=[keys], timestamps=None) | changes


def tracks(folder, content, **rate):
    (folder / "tracks.json").write_text(json.dumps(content))
    return read_tracks(folder / "tracks.json", **rate)


def refusal(call, *arguments, **keywords):
    with pytest.raises(InputError) as refused:
        call(*arguments, **keywords)
    return str(refused.value)


def studio(*keys, video="x/Fight1.mp4", **value):
    """A task of Label Studio."""
    sequence = [dict(frame=f, enabled=on, x=10, y=20, width=40, height=40, rotation=0) | more for f, on, more in keys]
    region = dict(type="videorectangle", value=dict(sequence=sequence, labels=["Anomaly"]) | value)
    return dict(data=dict(video=video), annotations=[dict(result=[dict(type="choices"), region])])


@pytest.mark.parametrize(
    ("changes", "rate", "times"),
    [
        (dict(), 25.0, [0.0, 1.0]),
        (dict(), 30.0, [0.0, 25 / 30]),
        (dict(rate=50), 30.0, [0.0, 0.5]),
        (dict(rate=10, first_frame=0), 25.0, [0.1, 2.6]),
        (dict(box_infos=[[dict(time=3.5, bbox=BOX), dict(time=1, bbox=BOX, frame=99)]]), 25.0, [1.0, 3.5]),
    ],
)
def test_the_times_of_key_frames(tmp_path, changes, rate, times):
    (entry,) = tracks(tmp_path, [item(26, 1, **changes)], rate=rate)
    (found, boxes), *others = entry.tracks[0].stretches
    np.testing.assert_allclose(found, times, atol=1e-12)
    assert np.array_equal(boxes, [BOX, BOX]) and not others and entry.tracks[0].phrases == ("a man",)


def test_an_object_by_video_says_the_same_as_a_list(tmp_path):
    keys = [dict(frame=f, bbox=BOX, enabled=f not in (31, 71)) for f in (1, 31, 51, 71, 81)]
    (of_list,) = tracks(tmp_path, [item(*keys, global_caption=" a fight ")])
    region = [dict(caption="a man", keyframes=keys)]
    (of_object,) = tracks(tmp_path, {"Fight1.mp4": {"global": {"Caption": " a fight "}, "region": region}})
    for entry in (of_list, of_object):
        assert entry.name == "Fight1" and [(s.start, s.end, s.text) for s in entry.captions] == [(0, np.inf, "a fight")]
        assert [times.tolist() for times, _ in entry.tracks[0].stretches] == [[0, 1.2], [2, 2.8], [3.2]]
        found = [entry.tracks[0].box_at(time) is not None for time in (1.2, 1.3, 2.5, 3.0, 3.2)]
        assert found == [True, False, True, False, True]


def test_label_studio(tmp_path):
    timed = studio((1, True, {}), (61, False, dict(time=2.0)), framesCount=900, duration=30.0)
    counted = studio((31, True, {}), (61, False, {}), (91, False, {}), (121, True, {}), framesCount=899, duration=30.0)
    turned = studio((1, True, dict(rotation=5)), (26, True, {}))
    entries = tracks(tmp_path, [timed, counted, turned])
    assert [entry.rate for entry in entries] == [30.5, 29.97, 25.0] and entries[0].seconds == 30.0
    assert [times.tolist() for times, _ in entries[1].tracks[0].stretches] == [[30 / 29.97, 60 / 29.97], [120 / 29.97]]
    assert [times.tolist() for times, _ in entries[2].tracks[0].stretches] == [[1.0]] and entries[2].boxes.invalid == 1
    np.testing.assert_allclose(entries[0].tracks[0].stretches[0][1], [BOX, BOX])


def test_label_studios_own_export(shared):
    entries = read_tracks(shared / "data/video/fork/label_studio_subset.json", 30.0)
    assert [entry.rate for entry in entries] == [25.0] * 6
    assert [len(entry.tracks[0].stretches[0][0]) for entry in entries] == [2, 2, 1, 2, 2, 4]
    assert entries[0].tracks[0].spans == [(99 / 25, 145 / 25)] and entries[0].tracks[0].phrases == ("Object falling",)
    assert all(entry.seconds - entry.tracks[0].spans[0][1] > 0 for entry in entries)


def test_the_published_list(shared):
    data = shared / "data/video"
    videos = read_videos(data / "ucf_crime", "ucf-crime", "train")
    with open(data / "uca/durations.csv") as file:
        seconds = {row["video"]: float(row["seconds"]) for row in csv.DictReader(file)}

    def add(rate):
        entries = read_tracks(data / "fork/tracks_subset.json", rate)
        return add_annotations(videos, [replace(entry, seconds=seconds.get(entry.name)) for entry in entries])

    added, messages = add(25.0)
    assert "64 tracks and 39 sentences of 37 videos" in messages[0]
    assert "12 entries (10 videos) of test videos are left out: Explosion002_x264, Fighting003_x264" in messages[1]
    assert "24 entries (24 videos) of MSAD, another data set, are left out: Assault_1" in messages[2]
    assert messages[3].endswith("key frames are taken at 25 a second") and len(messages) == 4
    assert all(track.event == bool(r.classes) for r in added.records for track in r.tracks)
    assert added.records[0].tracks and not videos.records[0].tracks
    record = next(r for r in added.records if r.name == "Normal_Videos476_x264")
    assert [(span.start, span.end, span.event) for span in record.captions] == [
        (0.0, 51.6, False), (51.6, 103.3, False), (103.3, 154.9, False)
    ]  # fmt: skip
    assert add(30.0)[1][-1].endswith("of its video: key frames look like 25 frames a second")
    with pytest.raises(InputError, match=r"of Abuse001_x264 is at 95.55 s of 91.00 s at 20 .* 25 would fit"):
        add(20.0)


def test_ucas_two_forms_and_hivau(shared):
    data = shared / "data/video"
    both = [read_sentences(data / "uca" / f"UCFCrime_Test{rest}") for rest in (".json", "_first200.txt")]
    of_json, of_text = ({entry.name: entry.captions for entry in entries} for entries in both)
    assert sum(map(len, of_text.values())) == 200 and len(of_json) == 310
    for name in list(of_text)[:-1]:
        assert of_text[name] == of_json[name], name
    videos = read_videos(data / "ucf_crime", "ucf-crime", "train")
    assert "50 entries (50 videos) of test videos are left out" in add_annotations(videos, both[0])[1][1]
    entries = read_sentences(data / "hivau/ucf_database_test.json")
    assert len(entries) == 251 and sum(entry.events != () for entry in entries) == 128
    assert entries[0].events == ((5.5, 8.0),) and entries[0].seconds == 1412 / 30
    (record,) = (r for r in read_videos(data / "ucf_crime", "ucf-crime", "test").records if r.name == entries[0].name)
    added, _ = add_annotations(VideoSet([replace(record, events=None)], ("Abuse",)), entries)
    assert added.records[0].events == ((5.5, 8.0, "Abuse"),) == record.events
    assert [(s.start, s.end, s.event) for s in added.records[0].captions] == [(5.5, 8.0, True), (5.5, 6.7, True)]


def test_sentences_are_of_an_event_where_they_overlap_one(tmp_path):
    path, times = tmp_path / "uca.json", [[0, 1], [1.5, 3], [4, 9], [11, 12], [2, 2]]
    path.write_text(
        json.dumps({n: dict(duration=8, timestamps=times, sentences=["a"] * 5) for n in ("Fight1", "Calm1")})
    )
    sentences, boxes = read_sentences(path), tracks(tmp_path, [item(26, 51)])
    unknown, messages = add_annotations(SET, sentences)
    assert "2 entries (2 videos) have sentences at no time of their video, which are left out" in messages[1]
    assert [[(s.start, s.end) for s in r.captions] for r in unknown.records] == [[(0, 1), (1.5, 3), (4, 8)]] * 2
    assert not any(s.event for r in unknown.records for s in r.captions) and unknown.records[0].events is None
    for added, _ in (add_annotations(SET, boxes + sentences), add_annotations(SET, sentences + boxes)):
        assert added.records[0].events == ((1.0, 2.0, "Fighting"),) and added.records[1].events == ()
        assert [[s.event for s in r.captions] for r in added.records] == [[False, True, False], [False] * 3]
    (single,) = tracks(tmp_path, [item(26, global_caption="a fight")])
    (record, _) = add_annotations(SET, [single])[0].records
    assert record.events is None and record.captions[0].event and record.tracks[0].event


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([item(1, video="Fight2.mp4")] * 2, "2 entries (1 videos) of test videos are left out: Fight2"),
        ([item(1, video="MSAD/Fight_9.mp4")], "1 entries (1 videos) of MSAD, another data set, are left out: Fight_9"),
        ([item(1, video="Fight_9.mp4")], "1 entries (1 videos) of no training video are left out: Fight_9"),
        ([item(1, region_captions=["a", "b"])], "have not one phrase for each track; the first go together: Fight1"),
        ([item(1, dict(frame=2, bbox=[0.5, 0, 0.2, 1]), dict(frame=3, bbox=[-0.1, 0, 1, 1]))],
         "3 boxes, 1 (33.33%) dropped: 1 inverted, 0 without area inside the image; 1 kept and clipped"),
    ],
)  # fmt: skip
def test_what_is_left_out_is_named(tmp_path, content, words):
    videos = replace(SET, records=[*SET.records, VideoRecord("Fight2", None, ("Fighting",))])
    added, messages = add_annotations(videos, tracks(tmp_path, content))
    assert sum(words in message for message in messages) == 1 and all("tracks.json: " in m for m in messages)
    assert not added.records[2].tracks and len(added.records[0].tracks) == ("Fight1" in content[0]["video"])


def test_keys_are_held_against_the_file(tmp_path):
    write_video(tmp_path / "Fight1.mp4", [np.zeros((16, 16, 3), np.uint8)] * 30, 30)
    videos = replace(SET, records=[replace(FIGHT, path=tmp_path / "Fight1.mp4")])
    add_annotations(videos, tracks(tmp_path, [item(38)]))
    say = refusal(add_annotations, videos, tracks(tmp_path, [item(45)], rate=24.0))
    assert (
        "tracks.json, item 0: a key frame of Fight1 is at 1.83 s of 1.00 s at 24 frames a second; 30 would fit" in say
    )
    assert refusal(add_annotations, videos, tracks(tmp_path, [item(dict(time=2, bbox=BOX))])).endswith(
        "2.00 s of 1.00 s"
    )
    (tmp_path / "Fight1.mp4").write_bytes(b"no video")  # which its features will say
    assert len(add_annotations(videos, tracks(tmp_path, [item(45)]))[0].records[0].tracks) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], "holds no tracks"),
        ([item(0)], "item 0, box_infos[0], keys[0], frame: expected a whole number from 1"),
        ([item(dict(frame=1, bbox=[10, 20, 200, 220]))], "looks like pixels; expected fractions"),
        ([item(dict(frame=1))], "bbox: expected 4 numbers, got None"),
        ([item(1, region_captions=[3])], "region_captions: expected a text"),
        ([item(1, rate=0)], "rate: expected a number from 0.001"),
        ([item(1, timestamps=[1], global_caption="a")], "expected 2 numbers"),
        ({"Fight1.mp4": {"global": 1, "region": []}}, "expected a dict, got 1"),
        ([studio((1, True, dict(x="left")))], "expected a number"),
    ],
)
def test_bad_tracks_are_one_sentence(tmp_path, content, words):
    say = refusal(tracks, tmp_path, content)
    assert words in say and str(tmp_path / "tracks.json") in say


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.txt", "Fight1 00:01 ##a", "expected `NAME mm:ss.d mm:ss.d ##text`"),
        ("a.txt", "Fight1 00:01 00:0x ##a", "Fight1: expected a number"),
        ("a.json", '{"Fight1": {"timestamps": [[0, 1]], "sentences": ["a", "b"]}}', "do not go with ['a', 'b']"),
        ("a.json", '{"Fight1": {"events": []}}', "the times [] do not go with None"),
        ("a.json", "{}", "holds no sentences"),
        ("a.json", "[]", "expected sentences, an object"),
    ],
)
def test_bad_sentences_are_one_sentence(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    say = refusal(read_sentences, tmp_path / name)
    assert words in say and str(tmp_path / name) in say


@pytest.mark.parametrize(
    ("sound", "read"),
    [
        ([item(1, 9, global_caption="a", timestamps=[0, 9], rate=30, first_frame=1, duration=9)], read_tracks),
        ({"Fight1": {"global": {"Caption": "a"}, "region": [dict(caption="a", keyframes=[dict(frame=1, bbox=BOX)])]}},
         read_tracks),
        ([studio((1, True, dict(time=2.0)), framesCount=9, duration=1.0)], read_tracks),
        (dict(Fight1=dict(timestamps=[[0, 1], [2, 3]], sentences=["a", "b"], duration=9)), read_sentences),
        (dict(Fight1=dict(events=[[0, 1]], events_summary=["a"], label=["A"], clips=[[[0, 1]]], clips_caption=[["a"]],
                          fps=30, n_frames=90)), read_sentences),
    ],
)  # fmt: skip
def test_damaged_files_are_read_sanely_or_refused(tmp_path, sound, read):
    hunt(tmp_path / "a.json", sound, lambda path: add_annotations(SET, read(path)), 300)
