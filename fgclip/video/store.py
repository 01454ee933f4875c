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
        counts = [found.get(name) for name in ("dim", "clip_frames")] if isinstance(found, dict) else [None]
        if not all(type(count) is int and count > 0 for count in counts):
            raise InputError(f"{index} is not an index of features")
        if key is not None and found != key:
            differing = [name for name in key | found if found.get(name) != key.get(name)]
            theirs, ours = ({name: of.get(name) for name in differing} for of in (found, key))
            raise InputError(f"{self.folder} holds features of another key, {theirs}; expected {ours}")
        return found

    def _path(self, name: str, ending: str = "clips.json") -> Path:
        return inside(self.folder, f"{name}.{ending}", str(self.folder))

    def record(self, name: str) -> dict | None:
        """What is known of a video: frames, 0 of a damaged one, rate, bytes of its file, and problem or None."""
        path = self._path(name)
        if not path.is_file():
            return None
        record = read_json(path, "a record of features", dict)
        if not {"frames", "rate", "bytes", "problem"} <= record.keys():
            raise InputError(f"{path} is not a record of features")
        return record

    def __contains__(self, name: str) -> bool:
        return bool((self.record(name) or dict(frames=0))["frames"])

    def names(self) -> list[str]:
        """The videos whose features are here, sorted."""
        found = (path.name.removesuffix(".clips.json") for path in self.folder.glob("[!.]*.clips.json"))
        return sorted(name for name in found if name in self)

    def error(self, name: str) -> str | None:
        """Why a video that was tried has no features, as a sentence."""
        record = self.record(name)
        return record["problem"] if record is not None and not record["frames"] else None

    def write(self, name: str, clips: Clips | None, *, size: int = 0, problem: str | None = None) -> None:
        """Keep the clips of a video, or None and the `problem` by which it is damaged. size: bytes of its file.

        Raises InputError where features are not finite.
        """
        path = self._path(name)
        with writing(path):
            path.unlink(missing_ok=True)
        for kind, array in clips.features.items() if clips else ():
            if not np.isfinite(array).all():
                raise InputError(f"{name}: features that are not finite: damaged weights or narrow --amp")
            with whole_file(self._path(name, f"{kind}.npy")) as file:
                np.save(file, array, allow_pickle=False)
        known = dict(frames=clips.frames, rate=str(clips.rate)) if clips else dict(frames=0, rate="0")
        write_json(path, dict(**known, bytes=size, problem=problem))

    def read(self, name: str) -> Clips:
        """The clips of a video, mapped from the disk. Raises InputError where they are missing or damaged."""
        record = self.record(name)
        if record is None or not record["frames"]:
            raise InputError(f"{self.folder} holds no features of {name}" + f" ({record['problem']})" * bool(record))
        frames = number(record["frames"], f"{self._path(name)}, frames", 1, 2**40, whole=True)
        rows, arrays = math.ceil(frames / self.key["clip_frames"]), []
        try:
            rate = Fraction(record["rate"])
            for kind, width in zip(INPUTS, (self.key["dim"], self.key["dim"], 4), strict=True):
                arrays.append(np.load(self._path(name, f"{kind}.npy"), mmap_mode="r", allow_pickle=False))
                if (arrays[-1].shape, arrays[-1].dtype) != ((rows, width), np.float16):
                    raise ValueError(f"{kind} is not ({rows}, {width}) of float16")
        except (OSError, ValueError, EOFError, TypeError, ZeroDivisionError, AttributeError) as error:
            raise InputError(f"{error}; delete {self._path(name)} to extract the features of {name} again") from error
        return Clips(*arrays, frames=frames, rate=rate)
