"""The temporal head, its losses, its samples and the drawn videos.

In two processes, too: this file starts itself for that.
"""

import math
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from fgclip import FGCLIP, Tokenizer
from fgclip.losses import PairBank
from fgclip.model import l2_normalize
from fgclip.video import model as head_module
from fgclip.video import training as samples
from fgclip.video.features import INPUTS, Clips
from fgclip.video.model import GatedPool, TemporalHead, VideoModel, class_prompts
from fgclip.video.records import VideoRecord
from fgclip.video.synthetic import EVENTS, SyntheticVideos
from fgclip.video.training import (
    LOSSES,
    ClipBags,
    VideoFrames,
    VideoLoss,
    bag_loss,
    class_loss,
    collate_bags,
    shortened,
    smoothness,
    text_separation,
    top_mean,
)
from trainkit import distributed
from trainkit.errors import InputError
from trainkit.sampler import AlternatingSampler

DIM, CLIP_FRAMES = 16, 4


def randomised(module):
    """No zero that hides a mistake."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return module.eval()


def head(**changes) -> TemporalHead:
    torch.manual_seed(0)
    return TemporalHead(DIM, **dict(classes=len(EVENTS), heads=2, window=2, dropout=0.0) | changes)


def features(*shape, seed=0) -> dict:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(*shape, width, generator=draw)
            for name, width in (("global", DIM), ("motion", DIM), ("amount", 4))}  # fmt: skip


def video_model() -> VideoModel:
    tower, tokenizer = dict(width=32, layers=2, heads=4, mlp_width=64), Tokenizer("bytes")
    text = dict(vocab_size=tokenizer.vocab_size, context_length=77, **tower)
    torch.manual_seed(0)
    towers = randomised(FGCLIP(vision=dict(image_size=32, patch_size=8, **tower), text=text, embed_dim=DIM))
    clips = dict(clip_frames=CLIP_FRAMES, frames_per_clip=1)
    return VideoModel(towers, head(), tokenizer, prompts=class_prompts(EVENTS), clips=clips)


def unit_texts() -> torch.Tensor:
    return l2_normalize(torch.randn(1 + len(EVENTS), DIM, generator=torch.Generator().manual_seed(9)))


def truth(record, frames: int) -> np.ndarray:
    """Which of so many frames belong to an event."""
    happens = np.zeros(frames, bool)
    for start, end, name in record.events:
        assert (name,) == record.classes
        happens[round(30 * start) : round(30 * end)] = True
    return happens


# ---- the head


def test_an_untouched_head_is_zero_shot_clip():
    model = video_model().train()
    pixels = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    image, texts = l2_normalize(model.fgclip.encode_image(pixels)), []
    for prompts in class_prompts(EVENTS).values():
        tokens = model.tokenizer(list(prompts), 77)
        texts.append(l2_normalize(l2_normalize(model.fgclip.encode_text(tokens)).mean(0)))
    expected = image @ torch.stack(texts).T / 0.07  # (6, 1 + C)
    clips = features(2, 3) | {"global": 5 * image.view(2, 3, DIM)}
    output = model(dict(features=clips, mask=torch.tensor([[True] * 3, [True, True, False]])))
    torch.testing.assert_close(output["classes"].view(6, -1), expected, atol=1e-5, rtol=1e-5)
    scored = model.head.score({name: rows.flatten(0, 1) for name, rows in clips.items()}, model.class_texts)
    torch.testing.assert_close(scored[1], expected.softmax(-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("count", [1, 7, 8, 40])
def test_scores_in_pieces_are_those_of_the_whole(count, monkeypatch):
    monkeypatch.setattr(head_module, "CHUNK", 7)
    own, texts, clips = randomised(head()), unit_texts(), features(count)
    whole = own({name: rows[None] for name, rows in clips.items()}, torch.ones(1, count, dtype=torch.bool), texts)
    anomaly, classes, frames = own.score(clips, texts)
    torch.testing.assert_close(anomaly, whole["anomaly"][0].sigmoid(), atol=1e-5, rtol=0)
    torch.testing.assert_close(classes, whole["classes"][0].softmax(-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(frames, whole["frames"][0], atol=1e-5, rtol=0)


def test_padding_and_clips_out_of_reach_change_nothing():
    own, texts, clips = randomised(head()), unit_texts(), features(2, 13)
    mask = torch.arange(13) < torch.tensor([[13], [6]])
    both = own(clips, mask, texts)
    alone = own({name: rows[1:, :6] for name, rows in clips.items()}, mask[1:, :6], texts)
    for name in ("anomaly", "classes", "frames"):
        torch.testing.assert_close(both[name][1, :6], alone[name][0], atol=1e-5, rtol=1e-5)
        assert both[name].isfinite().all()
        longer = own(clips | {"global": 3 * clips["global"]}, mask, texts)[name]  # only its direction counts
        torch.testing.assert_close(longer, both[name], atol=1e-4, rtol=1e-4)
    clips = {name: rows[:1].requires_grad_() for name, rows in clips.items()}
    output = own(clips, mask[:1], texts)
    (output["anomaly"][0, 6] + output["classes"][0, 6].sum()).backward()
    for rows in clips.values():  # two layers of two clips to either side
        assert [bool(row.any()) for row in rows.grad[0]] == [2 <= i <= 10 for i in range(13)]


def test_inputs_are_standardised_and_may_be_left_out():
    own, videos = head(inputs=("global", "amount")), [features(5), features(30, seed=1)]
    own.standardise(videos)
    rows = torch.cat([torch.cat([l2_normalize(video["global"]), video["amount"]], dim=1) for video in videos])
    torch.testing.assert_close(own.mean, rows.mean(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(own.spread, rows.std(0, correction=0), atol=1e-5, rtol=0)
    seen = []
    own.embed.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    own.score(videos[0], unit_texts())
    torch.testing.assert_close(seen[0][0], (rows[:5] - own.mean) / own.spread)


def test_the_pool_starts_as_the_mean_and_attends_to_what_counts():
    rows, mask = torch.randn(3, 5, DIM), torch.arange(5) < torch.tensor([[5], [3], [1]])
    for pool, attends in ((GatedPool(DIM), False), (randomised(GatedPool(DIM)), True)):
        for i, count in enumerate((5, 3, 1)):
            own = rows[i, :count]
            weights = pool.score(own).exp() / pool.score(own).exp().sum()
            expected = own.mean(0) + attends * (weights * own).sum(0) @ pool.projection.weight.T
            torch.testing.assert_close(pool(rows, mask)[i], expected, atol=1e-5, rtol=1e-5)


# ---- losses


def test_losses_are_those_of_a_plain_loop():
    lengths, share = (1, 15, 16, 40), 1 / 16
    mask = torch.arange(40) < torch.tensor(lengths)[:, None]
    draw = torch.Generator().manual_seed(0)
    anomaly, classes = torch.randn(4, 40, generator=draw), torch.randn(4, 40, 3, generator=draw)
    labels, targets = torch.tensor([0, 1, 1, 0]), torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0.5, 0.5], [1, 0, 0]])
    bags, logits, steps = [], [], []
    for i, count in enumerate(lengths):
        most = {1: 1, 15: 1, 16: 2, 40: 3}[count]
        own = sorted((1 / (1 + math.exp(-x)) for x in anomaly[i, :count].tolist()), reverse=True)
        bags.append(sum(own[:most]) / most)
        logits.append([sum(sorted(column)[-most:]) / most for column in classes[i, :count].T.tolist()])
        row = anomaly[i, :count].sigmoid().tolist()
        steps += [(a - b) ** 2 for a, b in zip(row, row[1:], strict=False)]
    bags, logits = torch.tensor(bags), torch.tensor(logits)
    torch.testing.assert_close(top_mean(anomaly.sigmoid(), mask, share), bags)
    torch.testing.assert_close(top_mean(classes, mask, share), logits)
    expected = -torch.where(labels == 1, bags, 1 - bags).log().mean()
    torch.testing.assert_close(bag_loss(anomaly, mask, labels, share), expected)
    expected = -(targets * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(class_loss(classes, mask, targets, share), expected)
    assert smoothness(anomaly, mask).item() == pytest.approx(sum(steps) / len(steps))
    texts = unit_texts().tolist()
    cosines = [abs(sum(a * b for a, b in zip(texts[0], text, strict=True))) for text in texts[1:]]
    assert text_separation(unit_texts()).item() == pytest.approx(sum(cosines) / len(cosines))


class Bags:
    """Eight drawn videos with made-up features, and what a step of the head takes."""

    def __init__(self):
        self.videos, rng = SyntheticVideos(8, seed=0), np.random.default_rng(0)
        self.model = video_model()
        randomised(self.model.head)
        self.model.select("head", LOSSES)
        self.clips = {}
        for record in self.videos.records:
            frames = self.videos.open(record).claimed
            arrays = (rng.standard_normal((-(-frames // CLIP_FRAMES), n)) for n in (DIM, DIM, 4))
            arrays = dict(zip(INPUTS, (a.astype(np.float16) for a in arrays), strict=True))
            self.clips[record.name] = Clips(arrays, frames=frames, rate=Fraction(30))
        self.banks = {name: PairBank(12, DIM, classes=2) for name in ("track", "caption")}
        table, ids = self.model.embed(list(self.bags().rows))
        self.loss = VideoLoss(LOSSES, banks=self.banks, texts=table, ids=ids, top_share=1 / 16, device="cpu")

    def bags(self, most_clips=1000) -> ClipBags:
        return ClipBags(self.videos, self.clips, clip_frames=CLIP_FRAMES, most_clips=most_clips, seed=0)

    def steps(self, model, indices) -> dict:
        """Losses and gradients of two steps, the second with what the first has put into the banks."""
        bags, seen = self.bags(), {}
        for epoch in range(2):
            self.model.zero_grad()
            losses, metrics = self.loss(model, collate_bags([bags[epoch, i] for i in indices]))
            sum(losses.values()).backward()
            seen |= {f"{epoch} {name}": value.detach() for name, value in losses.items()}
            seen |= {f"{epoch} {name}": p.grad.clone() for name, p in self.model.head.named_parameters()}
        return seen | {name: float(value) for name, value in metrics.items()}


SHARES = ([0, 1, 2, 3, 4], [5, 6, 7])

if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.start("cpu")
    own = Bags()
    seen = own.steps(distributed.parallel(own.model), SHARES[distributed.rank()])
    torch.save(seen, Path(sys.argv[1]) / f"rank{distributed.rank()}.pt")
    distributed.stop()


def test_two_processes_are_one(tmp_path, two_ranks):
    first, second = two_ranks(__file__, tmp_path)
    own = Bags()
    for name, value in own.steps(own.model, sum(SHARES, [])).items():
        if "loss_" in name:  # DDP averages the gradients, and so what the ranks call their losses
            torch.testing.assert_close((first[name] + second[name]) / 2, value, msg=name)
        elif not name.endswith(("_r1", "_in_batch")):
            torch.testing.assert_close(first[name], value, msg=name, rtol=1e-4, atol=1e-6)


def test_a_bank_of_two_classes_fills_each_half_and_changes_nothing_else():
    own = Bags()
    batch = collate_bags([own.bags()[0, i] for i in range(8)])
    before, metrics = own.loss(own.model, batch)
    events = torch.tensor([bool(record.classes) for record in own.videos.records])
    torch.testing.assert_close(before["loss_bag"], bag_loss(own.model(batch)["anomaly"], batch["mask"], events))
    firsts = batch["hard_counts"].cumsum(0) - batch["hard_counts"]  # each span's own text stands before the altered
    assert torch.equal(batch["hard"][firsts], batch["spans"][batch["hard_rows"], 5])
    for name, kind in (("caption", 0), ("track", 1)):
        labels = batch["spans"][batch["spans"][:, 3] == kind, 4]
        halves = [min(6, int((labels == label).sum())) for label in (0, 1)]
        assert [len(half) for half in own.banks[name].images] == halves and min(halves) > 1
        assert metrics[f"{name}_bank"] == sum(halves) and metrics[f"{name}_bank_events"] == halves[1]
        assert metrics[f"{name}_in_batch"] == before[f"loss_{name}"]
    after, metrics = own.loss(own.model, batch)
    assert metrics["track_in_batch"] == before["loss_track"] and set(before) == {f"loss_{name}" for name in LOSSES}
    own.loss.use_banks = False
    assert own.loss(own.model, batch)[0]["loss_track"] == before["loss_track"]


# ---- samples


def test_videos_with_and_without_an_event_take_turns_and_resume():
    labels = [i % 3 == 0 for i in range(20)]  # 7 of 20
    sampler = AlternatingSampler(labels, 4, seed=1)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        keys = sum(epochs[-1], [])
        assert [labels[index] for _, index in keys] == [False, True] * 6 and len(set(keys)) == 12
    assert [i for _, i in sum(epochs[0], [])] != [i for _, i in sum(epochs[1], [])]
    sampler.advance(2)
    again = AlternatingSampler(labels, 4, seed=1)
    again.load_state_dict(sampler.state_dict())
    assert list(again) == epochs[1][2:]
    with pytest.raises(InputError, match="labels was"):
        AlternatingSampler([*labels, False], 4, seed=1).load_state_dict(sampler.state_dict())


def test_frames_depend_on_seed_epoch_and_index_alone_and_are_often_of_the_event():
    videos, options = SyntheticVideos(12, seed=3, image_size=32), dict(image_size=32, margin=0.0)
    frames, again, other = (VideoFrames(videos, **options, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(frames[1, 3].pixels, again[1, 3].pixels) and frames[1, 3].phrases == again[1, 3].phrases
    moments = {frames.draw((epoch, 3))[1] for epoch in range(9)} | {other.draw((0, 3))[1]}
    assert len(moments) == 10
    labels = []
    for epoch in range(30):
        for index, record in enumerate(videos.records):
            own, moment, sample = frames.draw((epoch, index))
            happens = bool(truth(record, 200)[int(moment * 30 + 1e-6)])
            shown = [track for track in record.tracks if track.box_at(moment) is not None]
            assert own is record and sample.phrases == [track.phrases[0] for track in shown]
            assert sample.record.label == any(track.event for track in shown) <= happens
            labels += [happens] * bool(record.classes)
    assert 0.6 < np.mean(labels) < 0.8  # 0.6, and what is drawn of the whole
    videos.records[0] = VideoRecord("silent")
    assert VideoFrames(videos, **options, seed=5).draw((0, 0))[0] in videos.records[1:]


def test_bags_hold_classes_and_what_is_said_when():
    own = Bags()
    bags, texts = own.bags(), list(own.bags().rows)
    for index, record in enumerate(own.videos.records):
        clips, target, _, spans = bags[4, index]
        assert torch.equal(clips["motion"], own.clips[record.name].tensors()["motion"])
        assert target.tolist() == [float(name in (record.classes or ("none",))) for name in ("none", *EVENTS)]
        assert spans == own.bags()[4, index][3] != bags[5, index][3] and len(spans) == samples.SPANS
        happens = truth(record, len(clips["global"]) * CLIP_FRAMES).reshape(-1, CLIP_FRAMES)
        for first, end, tracked, event, rows in spans:
            said = record.tracks if tracked else record.captions
            assert texts[rows[0]] in [t.phrases[0] if tracked else t.text for t in said if t.event == event]
            assert happens[first + 1 : end - 1].all() if event else (len(rows) > 1) == tracked
        short, _, _, parts = own.bags(most_clips=9)[4, index]
        assert len(short["global"]) == 9
        for (first, end, *_), (before, after, *_) in zip(parts, spans, strict=True):
            assert 0 <= first < end <= 9 and abs(first - 9 * before / len(happens)) <= 1
            assert abs(end - 9 * after / len(happens)) <= 1
    name = own.videos.records[1].name
    del own.clips[name]
    assert bags[4, 1][2] == own.videos.records[3].name and bags[4, 0][2] == own.videos.records[0].name


@pytest.mark.parametrize(("length", "count"), [(10, 9), (1000, 256), (7, 2)])
def test_a_longer_video_is_shortened_to_means(length, count):
    values = torch.randn(length, 3)
    rows = [values[k * length // count : (k + 1) * length // count].mean(0) for k in range(count)]
    torch.testing.assert_close(shortened(values, count), torch.stack(rows))


# ---- drawn videos


@pytest.fixture(scope="module")
def drawn():
    return SyntheticVideos(24, seed=7)


def test_half_of_the_drawn_videos_have_an_event_each_kind_equally_often(drawn):
    classes = [record.classes for record in drawn.records]
    assert [classes.count(kind) for kind in ((), *((event,) for event in EVENTS))] == [12, 3, 3, 3, 3]
    assert drawn.classes == EVENTS and not drawn.missing
    video, again = (SyntheticVideos(count, seed=7).open(drawn.records[1]) for count in (2, 24))
    assert np.array_equal(video.draw(40), again.draw(40))
    found = list(video.frames(9, (0, 4)))
    last = video.count - 1
    assert [index for index, *_ in found] == [i for i in range(last + 1) if i % 9 in (0, 4) or i >= last - 1]
    for (_, _, picture), own in zip(found, video.at([time for _, time, _ in found]), strict=True):
        assert np.array_equal(picture, own)


def extent(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The box (4,) in pixels of what differs between two pictures."""
    ys, xs = (abs(one.astype(int) - other).max(2) > 3).nonzero()
    return np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])


def test_boxes_lie_on_what_they_name(drawn):
    for record in drawn.records[:16]:
        video, bare = drawn.open(record), drawn.open(record)
        if video.event is None:  # without the thing that is drawn last
            phrase = " ".join(video.kinds[2])
            for name in ("kinds", "sides", "origin", "velocity"):
                setattr(bare, name, getattr(video, name)[:2])
        elif video.event == "explosion":
            bare.event, phrase = None, "explosion"
        else:
            continue
        (track,) = (track for track in record.tracks if phrase in track.phrases[0])
        for frame in range(video.start, video.end, 5):
            box = track.box_at(frame / 30)
            assert abs(extent(video.draw(frame), bare.draw(frame)) - 64 * box).max() <= 2.5


def test_labels_tracks_and_captions_agree_with_the_frames(drawn):
    for record in drawn.records:
        video = drawn.open(record)
        frames = np.arange(video.claimed)
        happens = (video.start <= frames) & (frames < video.end) & (video.event is not None)
        assert np.array_equal(truth(record, video.claimed), happens)
        assert 0.1 < happens.mean() < 0.32 if record.classes else not happens.any()
        times = frames / 30
        said = np.zeros((2, video.claimed), int)
        for span in record.captions:
            said[int(span.event)] += (span.start - 1e-6 <= times) & (times < span.end - 1e-6)
        assert np.array_equal(said, [~happens, happens])
        things = np.zeros(video.claimed, int)
        for track in record.tracks:
            boxes = [track.box_at(time) for time in times]
            inside = np.array([box is not None for box in boxes])
            assert all((box[:2] < box[2:]).all() for box in boxes if box is not None)
            assert not {*track.phrases} & {*track.negatives}
            assert (inside <= happens).all() if track.event else True
            things += inside & (track.phrases[0] != "an explosion")
        assert (things == 3).all()  # each thing has a phrase at every moment, and one alone
        assert any(track.event for track in record.tracks) == bool(record.classes)
        steps = np.linalg.norm(np.diff(video.centres(frames)[0], axis=0), axis=1)
        if video.event == "speeding":  # five times as fast, but where it turns back
            assert np.median(steps[happens[1:] & happens[:-1]]) > 4 * np.median(steps[~happens[1:]])
