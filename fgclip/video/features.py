"""Features of the clips of videos, made by an image tower in one pass over each video."""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fgclip.embedding_cache import IMAGE_PARTS, weights_hash
from fgclip.images import normalise
from fgclip.model import FGCLIP, l2_normalize
from fgclip.video import decode
from fgclip.video.records import VideoRecord, VideoSet
from fgclip.video.store import INPUTS, Clips, FeatureStore
from trainkit import distributed
from trainkit.device import autocast
from trainkit.errors import InputError

LEAST_AMOUNT = 1e-4  # of change, in colours of 0..1
LEAST_MOTION = 1e-6  # a single pixel of a patch of 32 that changes by 1 of 255 is more; rounding is less


class ClipEncoder:
    """Describes each clip of `clip_frames` frames by the picture in its middle and what changes until the next one.

    frames_per_clip: n pictures instead, frames floor((j + 1/2) clip_frames / n) of a clip; their features are averaged.
    batch_size: pictures at once. amp: a key of AUTOCAST.
    """

    def __init__(
        self, model: FGCLIP, *, clip_frames: int = 16, frames_per_clip: int = 1, device: torch.device | str = "cpu",
        batch_size: int = 64, amp: str = "none",
    ):  # fmt: skip
        if frames_per_clip > clip_frames:
            raise InputError(f"--frames-per-clip {frames_per_clip}: expected at most --clip-frames, {clip_frames}")
        self.model, self.device, self.amp = model.to(device), torch.device(device), amp
        self.clip_frames, self.frames_per_clip, self.batch_size = clip_frames, frames_per_clip, batch_size
        self.samples = tuple((2 * j + 1) * clip_frames // (2 * frames_per_clip) for j in range(frames_per_clip))
        self.offsets = tuple(sorted({(s + step) % clip_frames for s in self.samples for step in (0, 1)}))

    @torch.inference_mode()
    def encode(self, pictures: Tensor, following: Tensor) -> dict[str, Tensor]:
        """The features of n pictures, given the frame after each: both (n, 3, S, S) float32 in 0..1.

        Returns, float32, with d (P,) the mean absolute difference of each patch:
            global (n, D), the unit features of `encode_image`;
            motion (n, D), the unit features of the patches, averaged with weights max(0, d - median d), zero where
                nothing moves; of an even P the median is the lower of the two middle ones;
            amount (n, 4), the logarithms of mean and largest d, and of the means of the 4 and 12 largest, from 1e-4.
        """
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
        """The clips of a video, T = ceil(frames / clip_frames), in one pass that keeps a batch of pictures at most.

        The last clip takes the last frame for those that it lacks. A frame without a next one is its own.
        progress: called with how many frames are behind.
        """
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
        return Clips(*arrays, frames=video.count, rate=video.rate)

    def _pairs(self, video: decode.Video, progress=None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The pictures that are looked at and those after them, clip after clip, (S, S, 3) uint8 each."""
        side, made, held, small = self.model.vision_model.image_size, 0, None, None
        for index, _, picture in video.frames(self.clip_frames, self.offsets, last=True):
            small = np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC))
            if held is not None:
                yield held, small
                made += 1
            held = small if index % self.clip_frames in self.samples else None
            if progress is not None:
                progress(index + 1)
        for _ in range(math.ceil(video.count / self.clip_frames) * self.frames_per_clip - made):
            yield small, small


def weights_key(model: FGCLIP, clip_frames: int, frames_per_clip: int) -> dict[str, int | str]:
    """What features depend on, as plain values: two caches with the same key may be mixed."""
    sizes = dict(image_size=model.vision_model.image_size, dim=model.visual_projection.out_features)
    sizes |= dict(clip_frames=clip_frames, frames_per_clip=frames_per_clip)
    return dict(weights=weights_hash(model, IMAGE_PARTS[:2]), **sizes)


def lacking(records: Iterable[VideoRecord], store: FeatureStore) -> dict[str, int]:
    """Bytes of the videos that the store does not know, or not of that size, by name, the largest first."""
    sizes = {}
    for record in records:
        files = [record.path] if record.path else []
        files = record.path.iterdir() if record.path and record.path.is_dir() else files
        sizes[record.name] = sum(file.stat().st_size for file in files)
    ahead = [name for name, size in sizes.items() if (store.record(name) or {}).get("bytes") != size]
    return {name: sizes[name] for name in sorted(ahead, key=lambda name: (-sizes[name], name))}


def extract(
    videos: VideoSet, encoder: ClipEncoder, store: FeatureStore, *, between: Callable[[], None] | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[str]:  # fmt: skip
    """Write the features of the videos that the store lacks; -> the names of the damaged ones.

    The processes share them, the largest files first. A video that the store knows, damaged or not, is passed over
    as long as its file's size stays. Those that are not found are passed over.
    between: see `distributed.in_step`. progress: what wraps the videos of this process on their way, such as `tqdm`.
    """
    missing = set(videos.missing)
    records = {record.name: record for record in videos.records if record.name not in missing}
    ahead = distributed.run_on_main(lambda: lacking(records.values(), store))
    if any(records[name].path is not None and records[name].path.is_file() for name in ahead):
        decode.library()  # else its absence would be taken for damage
    mine, loads = [], [0] * distributed.world_size()
    for name, size in ahead.items():
        least = loads.index(min(loads))
        loads[least] += max(size, 1)
        mine += [name] * (least == distributed.rank())
    for name in distributed.in_step(progress(mine), len(mine), between):
        try:
            video = videos.open(records[name])
            clips, problem = encoder.video(video), video.problem
            clips = None if video.damaged else clips
        except InputError as error:
            clips, problem = None, str(error)
        store.write(name, clips, size=ahead[name], problem=problem)
    distributed.gather_objects(None)  # until all are written
    return [name for name in records if store.error(name) is not None]
