"""Features of the clips of videos, made by an image tower in one pass over each, and the folder that keeps them."""

import math
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from fgclip.embedding_cache import IMAGE_PARTS, weights_hash
from fgclip.images import normalise
from fgclip.model import FGCLIP, l2_normalize
from fgclip.video import decode
from fgclip.video.records import VideoSet
from trainkit import distributed
from trainkit.device import autocast
from trainkit.errors import InputError
from trainkit.files import inside, read_json, whole_file, write_json, writing
from trainkit.load_report import summarise

INPUTS = ("global", "motion", "amount")
LEAST_AMOUNT = 1e-4  # of change, in colours of 0..1
LEAST_MOTION = 1e-6  # a single pixel of a patch of 32 that changes by 1 of 255 is more; rounding is less


@dataclass(frozen=True)
class Clips:
    """The features of a video by their names in INPUTS, float16: (T, D), (T, D) and (T, 4). rate: frames a second."""

    features: dict[str, np.ndarray]
    frames: int
    rate: Fraction

    def tensors(self) -> dict[str, Tensor]:
        """Copies of the features, float32."""
        return {name: torch.from_numpy(array.astype(np.float32)) for name, array in self.features.items()}


class ClipEncoder:
    """Describes each clip of `clip_frames` frames by the picture in its middle and what changes until the next one.
    frames_per_clip: n pictures instead, frames floor((j + 1/2) clip_frames / n) of a clip; their features are averaged.
    batch_size: pictures at once."""

    def __init__(
        self, model: FGCLIP, *, clip_frames: int = 16, frames_per_clip: int = 1, device: torch.device | str = "cpu",
        batch_size: int = 64, amp: str = "none",
    ):  # fmt: skip
        if frames_per_clip > clip_frames:
            raise InputError(f"--frames-per-clip {frames_per_clip}: expected at most --clip-frames, {clip_frames}")
        self.model, self.device, self.amp = model.to(device), torch.device(device), amp
        self.clip_frames, self.frames_per_clip, self.batch_size = clip_frames, frames_per_clip, batch_size
        self.samples = tuple((2 * j + 1) * clip_frames // (2 * frames_per_clip) for j in range(frames_per_clip))

    @property
    def key(self) -> dict[str, int | str]:
        """What features depend on, as plain values: two caches with the same key may be mixed."""
        sizes = dict(image_size=self.model.vision_model.image_size, dim=self.model.visual_projection.out_features)
        sizes |= dict(clip_frames=self.clip_frames, frames_per_clip=self.frames_per_clip, version=2)
        return dict(weights=weights_hash(self.model, IMAGE_PARTS[:2]), **sizes)

    @torch.inference_mode()
    def encode(self, pictures: Tensor, following: Tensor) -> dict[str, Tensor]:
        """The features of n pictures, given the frame after each: both (n, 3, S, S) float32 in 0..1.

        Returns, float32, with d (P,) the mean absolute difference of each patch:
            global (n, D), the unit features of `encode_image`;
            motion (n, D), the unit features of the patches, averaged with weights max(0, d - median d), zero where
                nothing moves; of an even P the median is the lower of the two middle ones;
            amount (n, 4), the logarithms of mean and largest d, and of the means of the 4 and 12 largest, from 1e-4."""
        pictures, following, tower = pictures.to(self.device), following.to(self.device), self.model.vision_model
        with autocast(self.amp, self.device):
            tokens, size = tower.penultimate(normalise(pictures))
            pooled = self.model.visual_projection(tower.pool(tokens))
            patches = self.model.visual_projection(tower.dense(tokens, size).flatten(2).transpose(1, 2))  # (n, P, D)
        change = (pictures - following).abs().mean(dim=1, keepdim=True)
        change = F.avg_pool2d(change, tower.patch_size).flatten(1)  # (n, P)
        excess = (change - change.median(dim=1, keepdim=True).values).clamp(min=0)
        weight = excess / excess.sum(dim=1, keepdim=True).clamp(min=LEAST_MOTION)
        most = change.topk(min(12, change.shape[1]), dim=1).values
        amounts = (change.mean(dim=1), most[:, 0], most[:, :4].mean(dim=1), most.mean(dim=1))
        amount = torch.stack(amounts, dim=1).clamp(min=LEAST_AMOUNT).log()
        motion = torch.einsum("np,npd->nd", weight, l2_normalize(patches))
        return dict(zip(INPUTS, (l2_normalize(pooled), motion, amount), strict=True))

    @torch.inference_mode()
    def video(self, video: decode.Video, progress: Callable[[int], None] | None = None) -> Clips:
        """The clips of a video, T = ceil(frames / clip_frames), in one pass that keeps a batch of pictures at most. The
        last clip takes the last frame for those that it lacks, and what changed until then. progress: is told how many
        frames are behind."""
        each, parts, pairs = self.frames_per_clip, [], self._pairs(video, progress)
        size = max(1, self.batch_size // each) * each  # whole clips
        while pictures := list(islice(pairs, size)):
            colours = torch.from_numpy(np.stack(pictures)).to(self.device)  # (n, 2, S, S, 3)
            now, then = (colours.movedim(-1, 2).contiguous().float() / 255).unbind(1)
            rows = self.encode(now, then).values()
            # Half precision stays on the device until the end, so that a GPU need not be waited for.
            parts.append([row.unflatten(0, (-1, each)).mean(dim=1).half() for row in rows])
        if not parts:
            raise InputError(video.problem or "no frame of it can be decoded")
        arrays = (torch.cat(rows).cpu().numpy() for rows in zip(*parts, strict=True))
        return Clips(dict(zip(INPUTS, arrays, strict=True)), frames=video.count, rate=video.rate)

    def _pairs(self, video: decode.Video, progress=None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The pictures that are looked at and those after them, clip after clip, (S, S, 3) uint8 each."""
        side, made, held, small = self.model.vision_model.image_size, 0, None, None
        offsets = {(sample + step) % self.clip_frames for sample in self.samples for step in (0, 1)}
        for index, _, picture in video.frames(self.clip_frames, offsets):
            before, small = small, np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC))
            if held is not None:
                yield held, small
                made += 1
            held = small if index % self.clip_frames in self.samples else None
            if progress is not None:
                progress(index + 1)
        for _ in range(math.ceil(video.count / self.clip_frames) * self.frames_per_clip - made):
            yield small, small if before is None else before


class FeatureStore:
    """A folder of features: index.json with the key of their encoder, and a NAME.npz for each video. All processes open
    it together. Raises InputError where it holds features of another key."""

    def __init__(self, folder: str | Path, key: dict):
        self.folder, self.key = Path(folder), key
        distributed.run_on_main(self._settle)

    def _settle(self) -> None:
        index = self.folder / "index.json"
        if not index.is_file() and not any(self.folder.glob("*.npz")):
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            write_json(index, dict(key=self.key), indent=2)
        found = read_json(index, "the index of features", dict).get("key")
        found = found if isinstance(found, dict) else {}
        if differing := [name for name in self.key | found if found.get(name) != self.key.get(name)]:
            theirs, ours = ({name: of.get(name) for name in differing} for of in (found, self.key))
            raise InputError(f"{self.folder} holds features of another key, {theirs}; expected {ours}")

    def load(self, name: str, *parts: str) -> dict[str, np.ndarray] | None:
        """Arrays of a video, None where it was not tried yet: those of INPUTS, frames (0: it is damaged), rate, bytes
        of its file, and problem. Raises InputError where what is kept is damaged."""
        path = inside(self.folder, f"{name}.npz", str(self.folder))
        if not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                return {part: file[part] for part in parts}
        except (OSError, ValueError, EOFError, KeyError, AttributeError, zipfile.BadZipFile) as error:
            raise InputError(f"{path}: {error}; delete it to extract the features of {name} again") from error

    def __contains__(self, name: str) -> bool:
        return not self.error(name)

    def error(self, name: str) -> str:
        """Why there are no features of a video, "" where there are."""
        known = self.load(name, "frames", "problem")
        return "missing" if known is None else "" if known["frames"] else str(known["problem"])

    def write(self, name: str, clips: Clips | None, *, size: int = 0, problem: str | None = None) -> None:
        """Keep the clips of a video, or None and the `problem` by which it is damaged. size: bytes of its file. Raises
        InputError where features are not finite."""
        clips = clips or Clips({}, 0, Fraction(0))
        if not all(np.isfinite(array).all() for array in clips.features.values()):
            raise InputError(f"{name}: features that are not finite: damaged weights or narrow --amp")
        about = dict(frames=clips.frames, rate=str(clips.rate), bytes=size, problem=problem or "")
        with whole_file(inside(self.folder, f"{name}.npz", str(self.folder))) as file:
            np.savez(file, **clips.features, **about)

    def read(self, name: str) -> Clips:
        """The clips of a video. Raises InputError where they are missing or damaged."""
        if problem := self.error(name):
            raise InputError(f"{self.folder} holds no features of {name} ({problem})")
        features, known = self.load(name, *INPUTS), self.load(name, "frames", "rate")
        rows, widths = math.ceil(known["frames"] / self.key["clip_frames"]), (self.key["dim"], self.key["dim"], 4)
        for (kind, array), width in zip(features.items(), widths, strict=True):
            if (array.shape, array.dtype) != ((rows, width), np.float16):
                raise InputError(f"{self.folder}, {name}: {kind} is not ({rows}, {width}) of float16")
        return Clips(features, frames=int(known["frames"]), rate=Fraction(str(known["rate"])))


def extract(
    videos: VideoSet, encoder: ClipEncoder, store: FeatureStore, between: Callable[[], None] | None = None
) -> list[str]:
    """Write the features of the videos that the store lacks; -> those that are missing or damaged, each with the cause.
    The processes share them, the largest files first. between: see `distributed.in_step`."""
    records = {record.name: record for record in videos.records}
    ahead = distributed.run_on_main(lambda: lacking(videos, store))
    if any(records[name].path is not None and records[name].path.is_file() for name in ahead):
        decode.library()  # else its absence would be taken for damage
    mine, loads = [], [0] * distributed.world_size()
    for name, size in ahead.items():
        least = loads.index(min(loads))
        loads[least] += max(size, 1)
        mine += [name] * (least == distributed.rank())
    bar = tqdm(mine, desc="features", unit="video", disable=None if distributed.is_main() else True)
    for name in distributed.in_step(bar, len(mine), between):
        try:
            video = videos.open(records[name])
            clips, problem = encoder.video(video), video.problem
            clips = None if video.damaged else clips
        except InputError as error:
            clips, problem = None, str(error)
        store.write(name, clips, size=ahead[name], problem=problem)
    distributed.gather_objects(None)  # until all are written
    return [f"{name} ({cause})" for name in records if (cause := store.error(name))]  # of features alone, too


def lacking(videos: VideoSet, store: FeatureStore) -> dict[str, int]:
    """Bytes by name of the videos that a store does not know, damaged or not, or of another size; the largest first."""
    ahead, missing = {}, set(videos.missing)
    for name, path in ((record.name, record.path) for record in videos.records if record.name not in missing):
        files = [] if path is None else path.iterdir() if path.is_dir() else [path]
        size, known = sum(file.stat().st_size for file in files), store.load(name, "bytes")
        if known is None or known["bytes"] != size:
            ahead[name] = size
    return dict(sorted(ahead.items(), key=lambda item: (-item[1], item[0])))


def refuse_lost(lost: list[str], allowed: int) -> None:
    """Raises InputError where more videos are lost than --allow-missing says."""
    if len(lost) > allowed:
        say = f"{len(lost)} videos are missing or damaged (--allow-missing goes without)"
        raise InputError(f"{say}: {summarise(lost, 4)}")
