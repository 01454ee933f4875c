"""Data sets of videos: which there are, and what happens in them when, in seconds (float64) from their beginning."""

import os
import re
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import numpy as np

from fgclip.video.decode import VIDEO_SUFFIXES, Video, open_video
from trainkit.errors import InputError
from trainkit.files import is_image, number, read_lines, shown
from trainkit.load_report import summarise

UCF_RATE, XD_RATE = 30.0, 24.0  # frames a second in which the two data sets count
# Code in a name of XD-Violence -> class.
XD_CLASSES = dict(B1="fighting", B2="shooting", B4="riot", B5="abuse", B6="car accident", G="explosion")
Event = tuple[float, float, str]  # start and end in seconds, class
# By name: the classes of training and of test videos, events where there is an annotation, and paths that a list gives.
Layout = tuple[dict, dict, dict, dict]
Found = dict[str, list[Path]]  # the paths of videos and folders of images by name


@dataclass(frozen=True, eq=False)
class Track:
    """A thing over time. stretches: where it can be seen, each of times (n,) in s, ascending, and boxes (n, 4) float64,
    xyxy in 0..1. phrases: what it is and does. event: whether that is an event. negatives: alterations of the first."""

    stretches: tuple[tuple[np.ndarray, np.ndarray], ...]
    phrases: tuple[str, ...] = ()
    event: bool = False
    negatives: tuple[str, ...] = ()

    @property
    def spans(self) -> list[tuple[float, float]]:
        """First and last time of each stretch in s."""
        return [(float(times[0]), float(times[-1])) for times, _ in self.stretches]

    def box_at(self, time: float, margin: float = 0.0) -> np.ndarray | None:
        """The box (4,) at a time in s, linear within a stretch, and up to `margin` s outside of one that of its end."""
        away = [max(start - time, time - end, 0) for start, end in self.spans]
        times, boxes = self.stretches[int(np.argmin(away))]
        return np.array([np.interp(time, times, side) for side in boxes.T]) if min(away) <= margin + 1e-6 else None


@dataclass(frozen=True)
class Span:
    """A sentence about a video from start to end in s (inf: its end). event: whether it tells of one."""

    start: float
    end: float
    text: str
    event: bool


@dataclass(frozen=True)
class VideoRecord:
    """One video. name: its file's name without the suffix, in a data set once. path: None where it was not found.
    classes: of its events, () for a normal video. events: when they are, None where that is not known; the class of
    one is "" where only the whole video's are known. source: videos cut from one recording share it."""

    name: str
    path: Path | None = None
    classes: tuple[str, ...] = ()
    events: tuple[Event, ...] | None = None
    tracks: tuple[Track, ...] = ()
    captions: tuple[Span, ...] = ()
    source: str = ""


@dataclass
class VideoSet:
    """Videos of one split. classes: of events, without normal. test_names: the data set's test videos. notes: sentences
    about what was found."""

    records: list[VideoRecord]
    classes: tuple[str, ...]
    test_names: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.records)

    @property
    def missing(self) -> list[str]:
        """Names of the videos of which there is no file."""
        return [record.name for record in self.records if record.path is None]

    def open(self, record: VideoRecord) -> Video:
        """The video of a record. Raises InputError where it cannot be opened."""
        if record.path is None:
            raise InputError(f"{record.name}: no such video was found")
        return open_video(record.path)

    def of(self, records: Iterable[VideoRecord]) -> "VideoSet":
        """The same set with other records."""
        part = copy(self)
        part.records = list(records)
        return part


def stem(name: str) -> str:
    """The last part of a path without the suffix of a video; other dots belong to the name."""
    name = name.replace("\\", "/").rpartition("/")[2]
    base, suffix = os.path.splitext(name)
    return base if suffix.lower() in VIDEO_SUFFIXES else name


def scan(root: Path) -> tuple[Found, list[Path]]:
    """The videos and the texts below a root, links followed."""
    if not root.is_dir():
        raise InputError(f"{root} is not a folder; expected the root of a data set of videos")
    videos, texts, seen = {}, [], set()
    for folder, folders, names in os.walk(root, followlinks=True):
        folders.sort()
        if (real := os.path.realpath(folder)) in seen:  # a link can lead back
            folders.clear()
            continue
        seen.add(real)
        paths = [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
        files = [path for path in paths if path.suffix.lower() in VIDEO_SUFFIXES]
        for path in files or [Path(folder)] * any(map(is_image, names)):
            videos.setdefault(stem(path.name), []).append(path)
        texts += [path for path in paths if path.suffix == ".txt"]
    return videos, texts


def one_path(paths: list[Path], listed: Path | None) -> Path | None:
    """The path of a video: that which a list gives, else the first of equal copies."""
    wanted = [path for path in paths if listed and f"{path.with_suffix('')}".endswith(f"/{listed.with_suffix('')}")]
    wanted = wanted or paths
    if len({path.stat().st_size if path.is_file() else path for path in wanted}) > 1:
        names = " and ".join(map(str, wanted[:2]))
        raise InputError(f"the name {stem(wanted[0].name)} belongs to two videos, {names}; expected one of each name")
    return wanted[0] if wanted else None


def agreed(texts: list[Path], parse: Callable[[Path], dict], *patterns: str) -> dict:
    """What the texts of the first pattern that is there say, which must be the same; nothing where there is none."""
    paths = next(filter(None, ([path for path in texts if fnmatch(path.name, each)] for each in patterns)), [])
    said = [parse(path) for path in paths]
    for path, content in zip(paths, said, strict=True):
        if not content or content != said[0]:
            problem = f"and {paths[0]} differ" if content else "is empty"
            raise InputError(f"{path} {problem}; expected one list of its kind, with a video in a line")
    return said[0] if said else {}


def ucf_list(path: Path) -> dict[str, Path]:
    """Name -> CLASS/NAME.mp4, of Anomaly_Train.txt or Anomaly_Test.txt."""
    videos = {}
    for line in read_lines(path, "CLASS/NAME.mp4 in a line"):
        if len(parts := line.replace("\\", "/").split("/")[-2:]) < 2:
            raise InputError(f"{path}: expected CLASS/NAME.mp4, got {shown(line)}")
        videos[stem(line)] = Path(*parts)
    return videos


def annotation(path: Path, rate: float) -> dict[str, tuple[Event, ...]]:
    """Name -> events, of lines `NAME[.mp4] [COUNT] [CLASS] start end [CLASS] start end` in frames, -1 for none."""
    videos = {}
    for line in read_lines(path, "NAME and frames in a line"):
        name, *words = line.split()
        if words[1:] and words[0].isdecimal() and words[1][0].isalpha():
            del words[0]  # how many frames the video has
        times, events, classes = [], [], xd_classes(stem(name))
        kind = classes[0] if len(classes) == 1 else ""
        for word in words:
            if word[0].isalpha():
                kind = XD_CLASSES.get(word, word)
                continue
            times.append(number(word, f"{path}, {name}", -1, whole=True) / rate)
            if len(times) % 2 == 0 and 0 <= times[-2] < times[-1]:
                events.append((*times[-2:], kind))
        if not times or len(times) % 2:
            raise InputError(f"{path}, {name}: expected pairs of frames, got {shown(line)}")
        videos[stem(name)] = tuple(events)
    return videos


def class_of(folder: str) -> tuple[str, ...]:
    """The class that a folder is named after, none where that is normal and not abnormal."""
    return () if re.search("(?<![a-z])normal", folder.lower()) else (folder,)


def xd_classes(name: str) -> tuple[str, ...]:
    """Classes by a name that ends in _label_ and codes; A is none."""
    found = re.search(r"_label_([A-Z0-9-]+)$", name)
    return tuple(XD_CLASSES[code] for code in found[1].split("-") if code in XD_CLASSES) if found else ()


def ucf_crime(root: Path, split: str, files: Found, texts: list[Path]) -> Layout:
    """Videos of the published lists; the class is their folder there."""
    train, test = (agreed(texts, ucf_list, f"Anomaly_{name}.txt") for name in ("Train", "Test"))
    known = ("Temporal_Anomaly_Annotation*.txt", "test_with_frame_counts.txt")
    times = agreed(texts, partial(annotation, rate=UCF_RATE), *known)
    if not test or not (train if split == "train" else times):
        wanted = "Anomaly_Train.txt" if split == "train" else known[0]
        raise InputError(f"{root} holds no Anomaly_Test.txt with {wanted}; --format folders needs no list")
    unknown = test.keys() - times.keys() if split == "test" else ()
    for names, place in ((train.keys() & test.keys(), "in Anomaly_Train.txt, too"), (unknown, "not in the annotation")):
        if names:
            said = f"{len(names)} videos of Anomaly_Test.txt are {place}"
            raise InputError(f"{root}: {said}: {summarise(sorted(names), 3)}")
    classes = ({name: class_of(path.parts[0]) for name, path in half.items()} for half in (train, test))
    return *classes, times, train | test


def xd_violence(root: Path, split: str, files: Found, texts: list[Path]) -> Layout:
    """Test videos are those of the annotation, and those below a folder whose name begins with `test`."""
    known = ("annotations_multiclasses.txt", "annotations.txt")
    times = agreed(texts, partial(annotation, rate=XD_RATE), *known)
    if not times:
        raise InputError(f"{root} holds no {known[1]} or {known[0]} of XD-Violence")
    train = {name for name in files if "_label_" in name}
    paths = [(name, f"/{path.relative_to(root)}".lower()) for name in train for path in files[name]]
    test = {name for name, path in paths if fnmatch(path, "*/test*/*")} | set(times)
    classes = ({name: xd_classes(name) for name in sorted(half)} for half in (train - test, test))
    return *classes, times, {}


def folders(root: Path, split: str, files: Found, texts: list[Path]) -> Layout:
    """root/CLASS/VIDEO, or root/train/CLASS/VIDEO and root/test/CLASS/VIDEO; the class of normal videos says so."""
    halves = [name for name in ("train", "test") if (root / name).is_dir()]
    if halves and split not in halves:
        raise InputError(f"{root} holds no folder {split}; expected {split}/CLASS/VIDEO beside {halves[0]}")
    classes = {"train": {}, "test": {}}
    for name, (path, *others) in files.items():
        if others:
            raise InputError(f"the name {name} belongs to two videos, {path} and {others[0]}; names must differ")
        half, *parts = [split] * (not halves) + [*path.relative_to(root).parts]
        if len(parts) < 2 or half not in classes:
            raise InputError(f"{path} lies in no folder of a class; expected CLASS/VIDEO below {root}")
        classes[half][name] = class_of(parts[0])
    return classes["train"], classes["test"], {}, {}


FORMATS = {"ucf-crime": ucf_crime, "xd-violence": xd_violence, "folders": folders}


def read_videos(root: str | Path, format: str, split: str) -> VideoSet:
    """The "train" or "test" videos of a data set in one of FORMATS.
    Lists and annotation are found by their published names anywhere below the root, videos by theirs. Raises InputError
    where lists are missing, empty or disagree, a name stands for two videos, or training has one label."""
    files, texts = scan(Path(root))
    train, test, times, listed = FORMATS[format](Path(root), split, files, texts)
    records = []
    for name, classes in (train if split == "train" else test).items():
        path, events = one_path(files.get(name, []), listed.get(name)), times.get(name, None if classes else ())
        records.append(VideoRecord(name, path, classes, events, source=name.partition("__#")[0]))  # as XD names parts
    kinds = {"anomalous" if record.classes else "normal" for record in records}
    if not kinds:
        raise InputError(f"{root} holds no videos to {split} with, as {format} has them")
    if split == "train" and len(kinds) == 1:
        raise InputError(f"{root}: every training video is {kinds.pop()}; expected normal and anomalous ones")
    copies = sorted(record.name for record in records if len(files.get(record.name, ())) > 1)
    notes = (f"{len(copies)} videos have equal copies, which are not read: {summarise(copies, 20)}",) if copies else ()
    names = sorted({kind for classes in (train | test).values() for kind in classes})
    return VideoSet(records, tuple(names), frozenset(test), notes)


def hold_out(videos: VideoSet, share: float, seed: int) -> tuple[VideoSet, VideoSet]:
    """Training videos and `share` of each class to validate on, at least one where a class has two. Videos of one
    source stay together. The choice depends on names and the seed alone."""
    groups: dict[tuple[str, ...], set[str]] = {}
    for record in videos.records:
        groups.setdefault(record.classes, set()).add(record.source)
    held, rng = set(), np.random.default_rng(seed)
    for sources in (sorted(groups[classes]) for classes in sorted(groups)):
        count = min(len(sources) - 1, max(1, round(share * len(sources))))
        held.update(rng.permutation(sources)[:count].tolist())
    return tuple(videos.of(r for r in videos.records if (r.source in held) is apart) for apart in (False, True))
