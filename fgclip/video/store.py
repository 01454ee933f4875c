"""A folder of the features of videos, which an interruption leaves whole."""

import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainkit import distributed
from trainkit.errors import InputError
from trainkit.files import inside, number, read_json, whole_file, write_json, writing

INPUTS = ("global", "motion", "amount")


@dataclass(frozen=True)
class Clips:
    """The features of a video, a row per clip: global_ and motion (T, D), amount (T, 4), all float16.

    frames: decoded frames. rate: frames a second.
    """

    global_: np.ndarray
    motion: np.ndarray
    amount: np.ndarray
    frames: int
    rate: Fraction

    @property
    def features(self) -> dict[str, np.ndarray]:
        """The arrays by their names in INPUTS."""
        return dict(zip(INPUTS, (self.global_, self.motion, self.amount), strict=True))

    def tensors(self) -> dict[str, Tensor]:
        """Copies of the arrays by their names in INPUTS, float32."""
        return {name: torch.from_numpy(array.astype(np.float32)) for name, array in self.features.items()}


class FeatureStore:
    """A folder of features: index.json with their key, and per video three arrays and NAME.clips.json, written last.

    key: that of `weights_key`; a new folder is made for it. None opens what is there, whatever its key.
    All processes open a store together. Raises InputError where the folder holds features of another key or none.
    """

    def __init__(self, folder: str | Path, key: dict | None = None):
        self.folder = Path(folder)
        self.key = distributed.run_on_main(lambda: self._settle(key))

    def _settle(self, key: dict | None) -> dict:
        index = self.folder / "index.json"
        if not index.is_file():
            if key is None or any(self.folder.glob("*.clips.json")):
                raise InputError(f"{index} does not exist; expected a folder of features, or a new one to write to")
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            write_json(index, dict(key=key), indent=2)
        found = read_json(index, "the index of features", dict).get("key")
        if not isinstance(found, dict) or not all(type(found.get(name)) is int for name in ("dim", "clip_frames")):
            raise InputError(f"{index} is not an index of features")
        if key is not None and found != key:
            raise InputError(f"{self.folder} holds features of another key, {found}; expected {key}")
        return found

    def _path(self, name: str, ending: str) -> Path:
        return inside(self.folder, f"{name}.{ending}", str(self.folder))

    def record(self, name: str) -> dict | None:
        """What is known of a video: frames, rate, bytes of its file, problem (or None), damaged; None if nothing is."""
        path = self._path(name, "clips.json")
        if not path.is_file():
            return None
        record = read_json(path, "a record of features", dict)
        if not {"frames", "rate", "bytes", "problem", "damaged"} <= record.keys():
            raise InputError(f"{path} is not a record of features")
        return record

    def __contains__(self, name: str) -> bool:
        return (record := self.record(name)) is not None and not record["damaged"]

    def names(self) -> list[str]:
        """The videos whose features are here, sorted."""
        found = (path.name.removesuffix(".clips.json") for path in self.folder.glob("[!.]*.clips.json"))
        return sorted(name for name in found if name in self)

    def error(self, name: str) -> str | None:
        """Why a video that was tried has no features, as a sentence."""
        record = self.record(name)
        return record["problem"] if record is not None and record["damaged"] else None

    def write(self, name: str, clips: Clips | None, *, size: int = 0, problem: str | None = None) -> None:
        """Keep the clips of a video, or None and the `problem` by which it is damaged. size: bytes of its file.

        Raises InputError where features are not finite.
        """
        path = self._path(name, "clips.json")
        with writing(path):
            path.unlink(missing_ok=True)
        for kind, array in clips.features.items() if clips else ():
            if not np.isfinite(array).all():
                raise InputError(f"{name}: features that are not finite: damaged weights or narrow --amp")
            with whole_file(self._path(name, f"{kind}.npy")) as file:
                np.save(file, array, allow_pickle=False)
        known = dict(frames=clips.frames, rate=str(clips.rate)) if clips else dict(frames=0, rate="0")
        write_json(path, dict(**known, bytes=size, problem=problem, damaged=clips is None))

    def read(self, name: str) -> Clips:
        """The clips of a video, mapped from the disk. Raises InputError where they are missing or damaged."""
        record = self.record(name)
        if record is None or record["damaged"]:
            raise InputError(f"{self.folder} holds no features of {name}" + f" ({record['problem']})" * bool(record))
        frames = number(record["frames"], f"{self._path(name, 'clips.json')}, frames", 1, 2**40, whole=True)
        rows, arrays = math.ceil(frames / self.key["clip_frames"]), []
        for kind, width in zip(INPUTS, (self.key["dim"], self.key["dim"], 4), strict=True):
            try:
                arrays.append(np.load(self._path(name, f"{kind}.npy"), mmap_mode="r", allow_pickle=False))
                rate, found = Fraction(record["rate"]), (arrays[-1].shape, arrays[-1].dtype)
            except (OSError, ValueError, EOFError, TypeError, ZeroDivisionError, AttributeError) as error:
                raise InputError(f"{self.folder}, features of {name}, {kind}: {error}; extract them again") from error
            if found != ((rows, width), np.float16):
                place = self._path(name, f"{kind}.npy")
                raise InputError(f"{place}: expected ({rows}, {width}) of float16, found {found[0]} of {found[1]}")
        return Clips(*arrays, frames=frames, rate=rate)
