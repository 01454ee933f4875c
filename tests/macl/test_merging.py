"""Detections of three views as one list: against a plain loop, and in the detector."""

import math

import pytest
import torch
from torchvision.ops import box_iou

from macl.backbone import MODALITIES
from macl.merging import FLOOR, merge_views


def view(boxes, scores, labels=None):
    boxes = torch.as_tensor(boxes, dtype=torch.float64).reshape(-1, 4)
    labels = torch.ones(len(boxes)).long() if labels is None else labels
    return {"boxes": boxes, "labels": labels, "scores": torch.as_tensor(scores, dtype=torch.float64)}


def drawn(count, generator):
    """Boxes about four places, often on each other, of two classes."""
    corner = torch.randint(4, (count, 1), generator=generator) * 9 + 6 * torch.rand(count, 2, generator=generator)
    labels = torch.randint(1, 3, (count,), generator=generator)
    return view(torch.cat([corner, corner + 20], 1), torch.rand(count, generator=generator), labels)


def plain(views, score_threshold, limit):
    """The docstring's rule, box by box."""
    rows = [(*row, i) for i, one in enumerate(views) for row in zip(one["scores"].tolist(), one["boxes"],
                                                                     one["labels"].tolist(), strict=True)]  # fmt: skip
    merged = []
    while rows:
        _, box, label, _ = max(rows, key=lambda row: row[0])
        same = [row for row in rows if row[2] == label and box_iou(row[1][None], box[None]).item() > 0.5]
        rows = [row for row in rows if not any(row is one for one in same)]
        best = [max([row[0] for row in same if row[3] == i], default=0) for i in range(len(views))]
        logits = [math.log(p / (1 - p)) for p in (min(max(p, 1e-3), 1 - 1e-3) for p in best)]
        score = 1 / (1 + math.exp(-max(logits) - 0.25 * sum(logits) / len(views)))
        merged.append((score, box, label))
    return [row for row in sorted(merged, key=lambda row: -row[0]) if row[0] >= score_threshold][:limit]


@pytest.mark.parametrize("counts", [(9, 12, 7), (9, 0, 7), (0, 0, 0)])
@pytest.mark.parametrize(("threshold", "limit"), [(0.0, 100), (0.5, 100), (0.0, 3)])
def test_equals_a_plain_loop_over_random_views(counts, threshold, limit):
    generator = torch.Generator().manual_seed(sum(counts))
    for _ in range(8):
        views = [drawn(count, generator) for count in counts]
        merged, expected = merge_views(views, score_threshold=threshold, limit=limit), plain(views, threshold, limit)
        assert len(merged["scores"]) == len(expected) and merged["labels"].tolist() == [row[2] for row in expected]
        assert merged["scores"].tolist() == pytest.approx([row[0] for row in expected])
        assert merged["boxes"].tolist() == [row[1].tolist() for row in expected]


@torch.no_grad()
@pytest.mark.parametrize(("merge", "fusion"), [("logit", "mean"), ("none", "mean"), ("logit", "visible")])
def test_both_cameras_are_the_merge_of_three_views_and_one_camera_is_itself(build, unequal, merge, fusion, monkeypatch):
    model = build(merge=merge, fusion=fusion).double().eval()
    extracted, calls = model.extract({name: unequal[name] for name in MODALITIES}), []
    modes = {"both": MODALITIES, "visible": ("visible",)} | ({"infrared": ("infrared",)} if fusion != "visible" else {})
    merges, shown = (merge, fusion) == ("logit", "mean"), 0.4
    views = [model.detect_view(extracted, names, FLOOR if merges else shown) for names in modes.values()]
    detect_view = model.detect_view
    monkeypatch.setattr(model, "detect_view", lambda *args: calls.append(args[1]) or detect_view(*args))
    found = model.detect_modes(extracted, modes, score_threshold=0.4)
    assert len(calls) == len(set(calls)) == len(modes)  # each once
    alone = [[{k: v[one["scores"] > shown] for k, v in one.items()} for one in view] for view in views]
    both = alone[0]
    if merges:  # of what the views say below the threshold as well
        limits = dict(score_threshold=shown, limit=model.roi_head.max_detections)
        both = [merge_views(image, **limits) for image in zip(*views, strict=True)]
        assert any(len(one["boxes"]) != len(other["boxes"]) for one, other in zip(both, views[0], strict=True))
    torch.testing.assert_close(list(found.values()), [both, *alone[1:]], rtol=0, atol=0)
    torch.testing.assert_close(model.detect(extracted, score_threshold=0.4), both, rtol=0, atol=0)
