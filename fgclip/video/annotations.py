"""Boxes over time and sentences of other files, added to the videos of a data set."""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path

import torch

import fgclip.data.records as data
from fgclip.regions import BoxStatistics, usable_boxes
from fgclip.video.records import Span, Track, VideoRecord, VideoSet, stem
from trainkit.errors import InputError
from trainkit.files import number, numbers, objects, plain_text, read_json, read_lines, shown
from trainkit.load_report import summarise

# Key frame n of a file that counts from f, at r frames a second, is at (n - f) / r seconds. Label Studio counts so, and
# lists made of its exports, whatever the video has.
STUDIO_RATE, FIRST_FRAME = 25.0, 1
SLACK = 0.5  # seconds that a key frame may lie behind its video's end
RATES = (24, 25, 30, 50, 60)  # common frames a second
LOOKS_LIKE = 0.84  # the share of a video of 30 frames a second in which all keys counted at 25 lie


@dataclass(frozen=True, eq=False)
class Entry:
    """What an item of a file says about a video. The events of captions and tracks are settled by `add_annotations`."""

    file: str
    place: str  # file and item, for messages
    name: str  # of the video
    tracks: tuple[Track, ...] = ()
    captions: tuple[Span, ...] = ()
    events: tuple[tuple[float, float], ...] | None = None  # start and end in s, None where the file does not say
    seconds: float | None = None  # the video's length by the file
    rate: float | None = None  # frames a second of its key frames, None where they have times
    paired: bool = True  # whether each track has one phrase
    foreign: bool = False  # of MSAD, another data set
    boxes: BoxStatistics = field(default_factory=BoxStatistics)  # those that were met


def read_tracks(path: str | Path, rate: float = STUDIO_RATE) -> list[Entry]:
    """Tracks with phrases of a json, a folder of them, or a .txt that lists them; its form tells what it is.
    A list has items {"video", "global_caption", "region_captions", "box_infos": [[{"frame", "bbox"}]], "timestamps"};
    an object has {"global": {"Caption"}, "region": [{"caption", "keyframes"}]} by video; or Label Studio exported it.
    rate: frames a second in which key frames count where the file does not say it. An item of a list may say "rate" and
    "first_frame", and a key frame "time" in s instead. Raises InputError where a file is none of these."""
    entries = []
    for item, place in data.JsonItems(data.annotation_files(path)):
        items = {place: item}
        if "annotations" in item and "data" in item:
            items = {place: from_label_studio(item, place)}
        elif "video" not in item:
            items = {f"{place}, {shown(name)}": from_object(item, name, place) for name in item}
        entries += [listed(each, str(path), spot, rate) for spot, each in items.items()]
    if not entries:
        raise InputError(f"{path} holds no tracks")
    return entries


def listed(item: dict, file: str, place: str, rate: float) -> Entry:
    """What an item of a list says."""
    rate = number(item.get("rate", rate), f"{place}, rate", 1e-3)
    first = number(item.get("first_frame", FIRST_FRAME), f"{place}, first_frame", 0, whole=True)
    phrases = [plain_text(t, f"{place}, region_captions") for t in data.field(item, "region_captions", list, place)]
    tracks, boxes, keyed, counts = [], BoxStatistics(), 0, None
    for i, frames in enumerate(data.field(item, "box_infos", list, place)):
        keys = {}
        for key, spot in objects(dict(keys=frames), "keys", f"{place}, box_infos[{i}]"):
            box = numbers(key.get("bbox"), f"{spot}, bbox")
            if max(map(abs, box)) > data.FAR:
                raise InputError(f"{spot}: the box {shown(box)} looks like pixels; expected fractions of the sides")
            if "time" in key:
                time = number(key["time"], f"{spot}, time", 0)
            else:
                time = (number(key.get("frame"), f"{spot}, frame", first, 1e9, whole=True) - first) / rate
                counts = rate
            keys[time] = key.get("enabled") is not False, *box
        keyed += bool(keys)
        if (stretches := stretches_of(keys, boxes)) and i < len(phrases):
            tracks.append(Track(stretches, (phrases[i],)))
    times, video = item.get("timestamps"), data.field(item, "video", str, place)
    texts = [item["global_caption"]] if item.get("global_caption") else []
    return Entry(
        file, place, stem(video), tuple(tracks),
        spans([times or [0, inf]] * len(texts), texts, place, not times),  # without times it tells of an event
        seconds=number(item["duration"], f"{place}, duration", 0) if "duration" in item else None,
        rate=counts, paired=keyed in (0, len(phrases)), foreign="MSAD" in video, boxes=boxes,
    )  # fmt: skip


def stretches_of(keys: dict[float, tuple], boxes: BoxStatistics) -> tuple:
    """Stretches of a track of time -> (whether it goes on, *box). Unusable boxes are counted and left out."""
    parts, open_ended = [], False
    for time, (goes_on, *box) in sorted(keys.items()):
        if goes_on and not open_ended:
            parts.append([])
        if goes_on or open_ended:
            parts[-1].append((time, *box))
        open_ended = goes_on
    rows = [torch.tensor(part, dtype=torch.float64) for part in parts]  # (n, 5)
    kept = [(part, *usable_boxes(part[:, 1:], boxes)) for part in rows]
    return tuple((part[mask, 0].numpy(), usable.numpy()) for part, usable, mask in kept if len(usable))


def spans(times: list, texts: list, place: str, event: bool = False) -> tuple[Span, ...]:
    if not isinstance(times, list) or not isinstance(texts, list) or len(times) != len(texts):
        raise InputError(f"{place}: the times {shown(times)} do not go with {shown(texts)}; expected a pair for each")
    pairs = [numbers(pair, f"{place}, times", 2, 0, inf) for pair in times]
    texts = [plain_text(text, f"{place}, sentences").strip() for text in texts]
    return tuple(Span(*pair, text, event) for pair, text in zip(pairs, texts, strict=True))


def from_object(item: dict, name: str, place: str) -> dict:
    """What an object says of a video, as an item of a list."""
    value, place = data.field(item, name, dict, place), f"{place}, {shown(name)}"
    regions, times = [region for region, _ in objects(value, "region", place)], value.get("timestamps")
    return dict(
        video=name, global_caption=data.field(value, "global", dict, place).get("Caption"),
        timestamps=times[0] if isinstance(times, list) and times else None,
        region_captions=[r.get("caption") for r in regions], box_infos=[r.get("keyframes") for r in regions],
    )  # fmt: skip


def from_label_studio(task: dict, place: str) -> dict:
    """A task of Label Studio's export as an item of a list. The first annotation of several counts. A track's phrase is
    the task's category, else its label. A turned box counts as an empty one."""
    about, found = data.field(task, "data", dict, place), objects(task, "annotations", place)[:1]
    item = dict(video=about.get("filename") or about.get("video"), region_captions=[], box_infos=[])
    for result, spot in (part for first, where in found for part in objects(first, "result", where)):
        if result.get("type") != "videorectangle":
            continue
        value, keys = data.field(result, "value", dict, spot), []
        frames, seconds = value.get("framesCount"), value.get("duration")
        item |= dict(duration=seconds) if seconds else {}
        for key, where in objects(value, "sequence", spot):
            x, y, w, h = numbers([key.get(side) for side in ("x", "y", "width", "height")], where)
            w, h = (0, 0) if key.get("rotation") else (w, h)
            box = [x / 100, y / 100, (x + w) / 100, (y + h) / 100]
            keys.append(dict(frame=key.get("frame"), bbox=box, enabled=key.get("enabled")))
            if key.get("time"):  # exact, while a length may be that of the sound
                frames, seconds = key.get("frame"), key["time"]
        if frames and seconds:
            frames, seconds = (number(x, f"{spot}, frames and seconds", 1e-3) for x in (frames, seconds))
            item["rate"] = round(frames / seconds, 2)
        labels = value.get("labels") if isinstance(value.get("labels"), list) else []
        item["region_captions"].append(str(about.get("category") or [*labels, ""][0]).replace("_", " "))
        item["box_infos"].append(keys)
    return item


def read_sentences(path: str | Path) -> list[Entry]:
    """Sentences of UCA (json, or txt) or HIVAU (json). Raises InputError where a file is neither."""
    content, entries = uca_lines(path) if Path(path).suffix == ".txt" else read_json(path, "sentences", dict), []
    if not content:
        raise InputError(f"{path} holds no sentences")
    for name in content:
        place, item = f"{path}, {shown(name)}", data.field(content, name, dict, str(path))
        if "sentences" in item:
            captions = spans(item.get("timestamps"), item["sentences"], place)
            events, frames, rate = None, item.get("duration"), 1
        else:
            captions = spans(item.get("events"), item.get("events_summary"), place)
            events = tuple((span.start, span.end) for span in captions) if item.get("label") else ()
            clips, texts = (data.field(item, key, list, place) for key in ("clips", "clips_caption"))
            captions += tuple(span for pair in zip(clips, texts, strict=False) for span in spans(*pair, place))
            frames, rate = item.get("n_frames"), number(item.get("fps"), f"{place}, fps", 1e-3)
        seconds = None if frames is None else number(frames, f"{place}, length", 0, 1e9) / rate
        entries.append(Entry(str(path), place, stem(name), captions=captions, events=events, seconds=seconds))
    return entries


def uca_lines(path: str | Path) -> dict[str, dict]:
    """What UCA's json holds, but for lengths, of lines `NAME mm:ss.d mm:ss.d ##text`."""
    videos: dict[str, dict] = {}
    for line in read_lines(path, "UCA's sentences"):
        if (found := re.fullmatch(r"(\S+)\s+(\S+)\s+(\S+)\s*##(.*)", line)) is None:
            raise InputError(f"{path}: expected `NAME mm:ss.d mm:ss.d ##text`, got {shown(line)}")
        name, *clocks, text = found.groups()
        parts = [[number(part, f"{path}, {name}", 0) for part in clock.split(":")] for clock in clocks]
        video = videos.setdefault(name, dict(timestamps=[], sentences=[]))
        video["timestamps"].append([sum(part * 60**i for i, part in enumerate(each[::-1])) for each in parts])
        video["sentences"].append(text)
    return videos


def add_annotations(videos: VideoSet, entries: Sequence[Entry]) -> tuple[VideoSet, list[str]]:
    """The videos with what entries say about them, and sentences about what was read and what was left out.
    Test videos are left out. Where events are not known, those of the entries are taken, else their tracks. A track is
    of an event where its video has one; a sentence where it overlaps one or, where none is known, as its file says.
    Raises InputError where a key frame lies behind its video's end."""
    known = {record.name: record for record in videos.records if record.name not in videos.test_names}
    taken, messages = {}, []
    for file in dict.fromkeys(entry.file for entry in entries):
        own = [entry for entry in entries if entry.file == file]
        used = [entry for entry in own if entry.name in known]
        lengths = dict.fromkeys((entry.name for entry in used if not entry.seconds), inf)
        for name in lengths:
            with suppress(InputError):  # what is wrong with a file is told when it is read as a whole
                lengths[name] = videos.open(known[name]).seconds or inf
        used = [replace(entry, seconds=entry.seconds or lengths[entry.name]) for entry in used]
        boxes = BoxStatistics()
        for entry in used:
            taken.setdefault(entry.name, []).append(entry)
            boxes.update(entry.boxes)
        tracks, sentences = (sum(len(getattr(entry, part)) for entry in used) for part in ("tracks", "captions"))
        said = [f"{tracks} tracks and {sentences} sentences of {len({entry.name for entry in used})} videos"]
        other = [entry for entry in own if entry.name not in known and entry.name not in videos.test_names]
        for what, group in {
            "of test videos are left out": [entry for entry in own if entry.name in videos.test_names],
            "of MSAD, another data set, are left out": [entry for entry in other if entry.foreign],
            "of no training video are left out": [entry for entry in other if not entry.foreign],
            "have not one phrase for each track; the first go together": [entry for entry in used if not entry.paired],
            "have sentences at no time of their video, which are left out": [
                entry for entry in used if any(s.start >= min(s.end, entry.seconds) for s in entry.captions)
            ],
        }.items():
            names = list(dict.fromkeys(entry.name for entry in group))
            said += [f"{len(group)} entries ({len(names)} videos) {what}: {summarise(names, 20)}"] if group else []
        said += [str(boxes)] if boxes.invalid or boxes["clipped"] else []
        messages += [f"{file}: {text}" for text in said + rate_of(used)]
    return videos.of(with_entries(record, taken.get(record.name, [])) for record in videos.records), messages


def rate_of(entries: Sequence[Entry]) -> list[str]:
    """What there is to say about the rate of key frames. Raises InputError where one lies behind its video's end."""
    lasts = [(max(track.spans[-1][1] for track in entry.tracks), entry) for entry in entries if entry.tracks]
    for last, entry in lasts:
        if last > entry.seconds + SLACK:
            least = max(other * (e.rate or 0) / (e.seconds + SLACK) for other, e in lasts)
            fits = next((rate for rate in RATES if rate >= least), least)
            why = f" at {entry.rate:g} frames a second; {fits:.4g} would fit" if entry.rate else ""
            when = f"at {last:.2f} s of {entry.seconds:.2f} s"
            raise InputError(f"{entry.place}: a key frame of {entry.name} is {when}{why}")
    rates = sorted({entry.rate for _, entry in lasts if entry.rate})
    said = [f"key frames are taken at {' and '.join(f'{rate:g}' for rate in rates)} a second"] if rates else []
    share = max((last / entry.seconds for last, entry in lasts), default=1)
    if 0 < share < LOOKS_LIKE and rates and rates[-1] > STUDIO_RATE:
        said.append(f"none lies beyond {share:.0%} of its video: key frames look like {STUDIO_RATE:g} frames a second")
    return said


def with_entries(record: VideoRecord, entries: Sequence[Entry]) -> VideoRecord:
    """A record with the tracks, sentences and events of entries about it."""
    tracks = [replace(track, event=bool(record.classes)) for entry in entries for track in entry.tracks]
    events = record.events
    if events is None:
        times = [pair for entry in entries for pair in entry.events or ()]
        times = times or [span for track in tracks for span in track.spans]
        if times and all(start < end for start, end in times):  # a single key does not say how long
            events = tuple((*pair, record.classes[0] if len(record.classes) == 1 else "") for pair in times)
    captions = []
    for span in (replace(s, end=min(s.end, entry.seconds)) for entry in entries for s in entry.captions):
        told = span.event if events is None else any(s < span.end and span.start < e for s, e, _ in events)
        captions += [replace(span, event=told)] if span.start < span.end else []
    return replace(record, tracks=(*record.tracks, *tracks), captions=(*record.captions, *captions), events=events)
