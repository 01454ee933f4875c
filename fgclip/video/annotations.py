"""Boxes over time and sentences of other files, added to the videos of a data set.

Key frame n of a file that counts from f, at r frames a second, is at (n - f) / r seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fgclip.data.records import FAR, JsonItems, annotation_files, field, objects
from fgclip.regions import BoxStatistics, usable_boxes
from fgclip.video.records import Span, Track, VideoRecord, VideoSet, named, stem
from trainkit.errors import InputError
from trainkit.files import number, numbers, plain_text, read_json, read_lines, shown

FIRST_FRAME = 1  # Label Studio counts from it, and so do the lists made of its exports
STUDIO_RATE = 25.0  # in which it counts whatever the video has
SLACK = 0.5  # seconds that a key frame may lie behind its video's end
RATES = (24, 25, 30, 50, 60)  # common frames a second
LOOKS_LIKE = 0.84  # the share of a video of 30 frames a second in which all keys counted at 25 lie
MOST = 1e6  # seconds


@dataclass(frozen=True, eq=False)
class Entry:
    """What an item of a file says about a video. listed: its path there. place: file and item, for messages.

    captions: `event` as far as the file says it; tracks take it from their video. events: (start, end) in s, None where
    the file does not say. seconds: the video's length by the file. rate: frames a second of its key frames.
    paired: whether each track has one phrase. boxes: what was met.
    """

    file: str
    place: str
    listed: str
    tracks: tuple[Track, ...] = ()
    captions: tuple[Span, ...] = ()
    events: tuple[tuple[float, float], ...] | None = None
    seconds: float | None = None
    rate: float | None = None
    paired: bool = True
    boxes: BoxStatistics | None = None

    @property
    def name(self) -> str:
        return stem(self.listed)


def read_tracks(path: str | Path, rate: float = STUDIO_RATE) -> list[Entry]:
    """Tracks with phrases of a json, a folder of them, or a .txt that lists them; its form tells what it is.

    A list has items {"video", "global_caption", "region_captions", "box_infos": [[{"frame", "bbox"}]], "timestamps"};
    an object has {"global": {"Caption"}, "region": [{"caption", "keyframes"}]} by video; or Label Studio exported it.
    rate: frames a second in which key frames count where the file does not say it. An item of a list may say "rate" and
    "first_frame", and a key frame "time" in s instead. Raises InputError where a file is none of these.
    """
    entries = []
    for item, place in JsonItems(annotation_files(path)):
        if "annotations" in item and "data" in item:
            entries.append(listed(from_label_studio(item, place), str(path), place, rate))
        elif "video" in item:
            entries.append(listed(item, str(path), place, rate))
        else:
            for name in item:
                spot = f"{place}, {shown(name)}"
                entries.append(listed(from_object(name, field(item, name, dict, place), spot), str(path), spot, rate))
    return entries


def listed(item: dict, file: str, place: str, rate: float) -> Entry:
    """An item of a list."""
    rate = number(item.get("rate", rate), f"{place}, rate", 1e-3)
    first = number(item.get("first_frame", FIRST_FRAME), f"{place}, first_frame", 0, whole=True)
    phrases = [plain_text(text, f"{place}, region_captions") for text in field(item, "region_captions", list, place)]
    tracks, boxes, keyed, counted = [], BoxStatistics(), 0, False
    for i, frames in enumerate(field(item, "box_infos", list, place)):
        keys = {}
        for key, spot in objects(dict(keys=frames), "keys", f"{place}, box_infos[{i}]"):
            box = numbers(key.get("bbox"), f"{spot}, bbox")
            if max(map(abs, box)) > FAR:
                raise InputError(f"{spot}: the box {shown(box)} looks like pixels; expected fractions of the sides")
            if "time" in key:
                time = number(key["time"], f"{spot}, time", 0, MOST)
            else:
                time = (number(key.get("frame"), f"{spot}, frame", first, 1e9, whole=True) - first) / rate
                counted = True
            keys[time] = box, key.get("enabled") is not False
        keyed += bool(keys)
        if i < len(phrases) and (stretches := stretches_of(keys, boxes)):
            tracks.append(Track(stretches, (phrases[i],)))
    captions = ()
    if item.get("global_caption"):
        whole = item.get("timestamps") is None  # then it tells of the event where the video has one
        times = (0.0, float("inf")) if whole else item["timestamps"]
        captions = spans([times], [item["global_caption"]], place, event=whole)
    return Entry(
        file, place, field(item, "video", str, place), tuple(tracks), captions,
        seconds=number(item["duration"], f"{place}, duration", 0, MOST) if "duration" in item else None,
        rate=rate if counted else None, paired=keyed in (0, len(phrases)), boxes=boxes,
    )  # fmt: skip


def stretches_of(keys: dict[float, tuple[tuple, bool]], boxes: BoxStatistics) -> tuple:
    """Stretches of a track of time -> (box, whether it goes on). Unusable boxes are counted and left out."""
    parts, ended = [], True
    for time, (box, goes_on) in sorted(keys.items()):
        if goes_on and ended:
            parts.append([])
        if goes_on or not ended:
            parts[-1].append((time, *box))
        ended = not goes_on
    stretches = []
    for part in parts:
        rows = torch.tensor(part, dtype=torch.float64)  # (n, 5)
        usable, kept = usable_boxes(rows[:, 1:], boxes)
        if len(usable):
            stretches.append((rows[kept, 0].numpy(), usable.numpy()))
    return tuple(stretches)


def spans(times: Sequence, texts: Sequence, place: str, event: bool = False) -> tuple[Span, ...]:
    """Sentences with start and end in s; those that never were are left to `cut`."""
    if len(times) != len(texts):
        raise InputError(f"{place}: {len(texts)} sentences have {len(times)} times; expected as many")
    pairs = [numbers(pair, f"{place}, times", 2, 0, float("inf")) for pair in times]
    return tuple(
        Span(*pair, plain_text(text, f"{place}, sentences").strip(), event)
        for pair, text in zip(pairs, texts, strict=True)
    )


def from_object(name: str, value: dict, place: str) -> dict:
    """The value of a video in an object as an item of a list."""
    regions = [region for region, _ in objects(value, "region", place)]
    caption, times = field(value, "global", dict, place).get("Caption"), value.get("timestamps")
    return dict(
        video=name, global_caption=caption, timestamps=times[0] if times and isinstance(times, list) else None,
        region_captions=[r.get("caption") for r in regions], box_infos=[r.get("keyframes") for r in regions],
    )  # fmt: skip


def from_label_studio(task: dict, place: str) -> dict:
    """A task of Label Studio's export as an item of a list. The first annotation of several counts.

    A track says what was written to it, else the task's category, else its label. A turned box counts as an empty one.
    """
    data, annotations = field(task, "data", dict, place), objects(task, "annotations", place)
    results = [r for found, spot in annotations[:1] for r in objects(found, "result", spot)]
    said = {r.get("id"): field(r, "value", dict, s).get("text") for r, s in results if r.get("type") == "textarea"}
    item = dict(video=data.get("filename") or data.get("video"), region_captions=[], box_infos=[])
    for result, spot in (r for r in results if r[0].get("type") == "videorectangle"):
        value, keys = field(result, "value", dict, spot), []
        frames, seconds = value.get("framesCount"), value.get("duration")
        if seconds:
            item["duration"] = seconds
        for key, where in objects(value, "sequence", spot):
            x, y, w, h = numbers([key.get(side) for side in ("x", "y", "width", "height")], where)
            w, h = (0.0, 0.0) if key.get("rotation") else (w, h)
            box = [x / 100, y / 100, (x + w) / 100, (y + h) / 100]
            keys.append(dict(frame=key.get("frame"), bbox=box, enabled=key.get("enabled")))
            if key.get("time"):  # exact, while a duration is that of the sound, too
                frames, seconds = key.get("frame"), key["time"]
        if frames and seconds:
            frames, seconds = (number(x, f"{spot}, frames and seconds", 1e-3, 1e9) for x in (frames, seconds))
            item["rate"] = round(frames / seconds, 2)
        text = said.get(result.get("id")) or data.get("category") or value.get("labels") or ""
        item["region_captions"].append(" ".join(text if isinstance(text, list) else [text]).replace("_", " "))
        item["box_infos"].append(keys)
    return item


def read_sentences(path: str | Path) -> list[Entry]:
    """Sentences of UCA (json, or txt) or HIVAU (json). Raises InputError where a file is neither."""
    if Path(path).suffix == ".txt":
        return uca_lines(path)
    entries = []
    for name in (content := read_json(path, "UCA's or HIVAU's sentences", dict)):
        place, item = f"{path}, {shown(name)}", field(content, name, dict, str(path))
        if "sentences" in item:
            captions = spans(*(field(item, key, list, place) for key in ("timestamps", "sentences")), place)
            events, seconds = None, number(item.get("duration"), f"{place}, duration", 0, MOST)
        else:
            times, *said = (
                field(item, key, list, place) for key in ("events", "events_summary", "clips", "clips_caption")
            )
            captions = spans(times, said[0], place)
            for clips, texts in zip(said[1], said[2], strict=False):
                captions += spans(clips, texts, place)
            events = tuple((span.start, span.end) for span in captions[: len(times)]) if item.get("label") else ()
            rate = number(item.get("fps"), f"{place}, fps", 1e-3)
            seconds = number(item.get("n_frames"), f"{place}, n_frames", 0, 1e9) / rate
        entries.append(Entry(str(path), place, name, captions=captions, events=events, seconds=seconds))
    return entries


def uca_lines(path: str | Path) -> list[Entry]:
    """Entries of lines `NAME mm:ss.d mm:ss.d ##text`."""
    found: dict[str, tuple[list, list]] = {}
    for line in read_lines(path, "UCA's sentences"):
        about, marked, text = line.partition("##")
        if not marked or len(words := about.split()) != 3:
            raise InputError(f"{path}: expected `NAME mm:ss.d mm:ss.d ##text`, got {shown(line)}")
        times, texts = found.setdefault(words[0], ([], []))
        clocks = [[number(part, f"{path}, {words[0]}", 0) for part in word.split(":")[::-1]] for word in words[1:]]
        times.append([sum(part * 60**i for i, part in enumerate(parts)) for parts in clocks])
        texts.append(text)
    return [Entry(str(path), f"{path}, {name}", name, captions=spans(*s, str(path))) for name, s in found.items()]


def add_annotations(videos: VideoSet, entries: Sequence[Entry]) -> tuple[VideoSet, list[str]]:
    """The videos with what entries say about them, and sentences about what was read and what was left out.

    Test videos are left out. Where events are not known, those of the entries are taken, else their tracks. A track is
    of an event where its video has one; a sentence where it overlaps one or, where none is known, as its file says.
    Raises InputError where a key frame lies behind its video's end.
    """
    records, taken, messages = {record.name: record for record in videos.records}, {}, []
    for file in dict.fromkeys(entry.file for entry in entries):
        own = [entry for entry in entries if entry.file == file]
        used = [entry for entry in own if entry.name in records and entry.name not in videos.test_names]
        others = [entry for entry in own if entry.name not in records and entry.name not in videos.test_names]
        lengths = {entry.name: entry.seconds or seconds_of(videos, records[entry.name]) for entry in used}
        for entry in used:
            taken.setdefault(entry.name, []).append(cut(entry, lengths[entry.name]))
        groups = {
            "are of test videos, and are left out": [entry for entry in own if entry.name in videos.test_names],
            "are of MSAD, another data set, and are left out": [entry for entry in others if "MSAD" in entry.listed],
            "name no training video, and are left out": [entry for entry in others if "MSAD" not in entry.listed],
            "have not one phrase for each track; the first go together": [entry for entry in used if not entry.paired],
            "have sentences behind the video's end or without a length, which are left out": [
                entry for entry in used if len(cut(entry, lengths[entry.name]).captions) < len(entry.captions)
            ],
        }
        tracks, sentences = (sum(len(getattr(entry, part)) for entry in used) for part in ("tracks", "captions"))
        messages.append(f"{file}: {tracks} tracks and {sentences} sentences of {len(lengths)} videos")
        for what, group in groups.items():
            names = dict.fromkeys(entry.name for entry in group)
            if group:
                messages.append(f"{file}: {len(group)} entries ({len(names)} videos) {what}: {named(names)}")
        boxes = BoxStatistics()
        for entry in used:
            boxes.update(entry.boxes or {})
        messages += [f"{file}: {boxes}"] * bool(boxes.invalid or boxes["clipped"])
        messages += rate_of(file, used, lengths)
    part = videos.subset(range(len(videos)))
    part.records = [with_entries(record, taken.get(record.name, ())) for record in videos.records]
    return part, messages


def seconds_of(videos: VideoSet, record: VideoRecord) -> float | None:
    """A video's length by its header, where there is one; what is wrong with a file its features say."""
    try:
        return videos.open(record).seconds
    except InputError:
        return None


def cut(entry: Entry, seconds: float | None) -> Entry:
    """Sentences end with their video."""
    spoken = (replace(span, end=min(span.end, seconds or span.end)) for span in entry.captions)
    return replace(entry, captions=tuple(span for span in spoken if span.start < span.end))


def rate_of(file: str, entries: Sequence[Entry], lengths: dict[str, float | None]) -> list[str]:
    """What there is to say about the rate of key frames. Raises InputError where one lies behind its video's end."""
    shares = []
    for entry in entries:
        seconds, last = lengths[entry.name], max((track.span[1] for track in entry.tracks), default=0.0)
        if seconds and last > seconds + SLACK:
            fits = next(
                (r for r in RATES if last * (entry.rate or 0) <= r * seconds), last * (entry.rate or 0) / seconds
            )
            rates = f" at {entry.rate:g} frames a second; {fits:.4g} would fit" if entry.rate else ""
            raise InputError(f"{entry.place}: a key frame of {entry.name} is at {last:.2f} s of {seconds:.2f} s{rates}")
        if seconds and entry.rate and entry.tracks:
            shares.append(last / seconds)
    rates = sorted({entry.rate for entry in entries if entry.rate and entry.tracks})
    said = [f"{file}: key frames are taken at {' and '.join(f'{rate:g}' for rate in rates)} a second"] if rates else []
    if shares and max(shares) < LOOKS_LIKE and rates[-1] > STUDIO_RATE:
        said.append(
            f"{file}: no key frame lies behind {max(shares):.0%} of its video: they look like 25 frames a second"
        )
    return said


def with_entries(record: VideoRecord, entries: Sequence[Entry]) -> VideoRecord:
    """A record with the tracks, sentences and events of entries about it."""
    tracks = tuple(replace(t, event=bool(record.classes)) for entry in entries for t in entry.tracks)
    events = record.events
    if events is None:
        times = [pair for entry in entries for pair in entry.events or ()]
        times = times or [(keys[0], keys[-1]) for track in tracks for keys, _ in track.stretches]
        kind = record.classes[0] if len(record.classes) == 1 else ""
        if times and all(start < end for start, end in times):  # tracks of one key do not say how long
            events = tuple((float(start), float(end), kind) for start, end in times)
    captions = []
    for span in (span for entry in entries for span in entry.captions):
        event = span.event if events is None else any(s < span.end and span.start < e for s, e, _ in events)
        captions.append(replace(span, event=event and bool(record.classes)))
    return replace(record, tracks=record.tracks + tracks, captions=record.captions + tuple(captions), events=events)
