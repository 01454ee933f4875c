"""`--explain`: the evidence of each camera, MSP's factors, and what has nothing to show."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import refused

from macl import predict
from macl.explain import explain, has_reasons
from macl.merging import SAME
from macl.plots import COLOURS, FOUND_BY, draw_detections


@pytest.fixture
def images(batch):
    return {name: batch[name][1:] for name in ("visible", "infrared")}  # (3, 60, 80): padded for the maps


@pytest.mark.parametrize("merge", ["logit", "none"])
def test_evidence_is_what_each_camera_finds_there(build, images, merge):
    detector = build(merge=merge, score_threshold=0.05, classes=("person", "car")).eval()
    detections, reasons = explain(detector, images)
    evidence, factors = reasons.values()
    expected = detector(**images)[0]
    assert all(torch.equal(detections[key], expected[key]) for key in expected) and len(expected["boxes"])
    assert factors == {} and list(evidence) == ["visible", "infrared"]  # the gate is still 0
    assert set(expected["labels"].tolist()) == {1, 2}
    for name, scores in evidence.items():
        view = detector.detect(detector.extract({name: images[name]}), score_threshold=1e-3)[0]
        for box, label, score in zip(detections["boxes"], detections["labels"], scores, strict=True):
            low, high = torch.maximum(box[:2], view["boxes"][:, :2]), torch.minimum(box[2:], view["boxes"][:, 2:])
            shared = (high - low).clamp(min=0).prod(1)
            both = (box[2:] - box[:2]).prod() + (view["boxes"][:, 2:] - view["boxes"][:, :2]).prod(1)
            there = view["scores"][(shared / (both - shared) > SAME) & (view["labels"] == label)]
            assert score.item() == pytest.approx(max(there.tolist(), default=0), abs=1e-5)


def test_msp_shows_its_factors(build, images):
    detector = build().eval()
    assert has_reasons(detector, 2) and not has_reasons(detector, 1)  # a gate of 0 changes nothing
    assert not has_reasons(build(fusion="visible", msp=False), 2)
    with torch.no_grad():
        detector.neck.msp.gate.fill_(0.5)
        detector.neck.msp.attention.weight.zero_()
        detector.neck.msp.attention.bias.fill_(1.0)
    assert has_reasons(detector, 1)
    factors = explain(detector, images)[1]["factors"]
    assert {name: tuple(one.shape) for name, one in factors.items()} == dict.fromkeys(images, (60, 80))
    for one in factors.values():
        torch.testing.assert_close(one, torch.full_like(one, 1 + 0.5 / (1 + np.exp(-1.0))))
    evidence, factors = explain(detector, {"infrared": images["infrared"]})[1].values()
    assert evidence == {} and list(factors) == ["infrared"]
    assert not detector.neck.msp.attention._forward_hooks


def test_the_colour_says_which_camera_finds_it():
    boxes = torch.tensor([[10.0, 20 + 90 * i, 60, 90 + 90 * i] for i in range(4)])
    detections = {"boxes": boxes, "labels": torch.ones(4).long(), "scores": torch.tensor([0.9, 0.8, 0.7, 0.6])}
    evidence = {"visible": torch.tensor([0.9, 0.8, 0.1, 0.2]), "infrared": torch.tensor([0.9, 0.0, 0.7, 0.2])}
    sample = {name: torch.zeros(3, 400, 400, dtype=torch.uint8) for name in evidence}
    factors = {"visible": torch.linspace(1, 2, 400).expand(400, 400)}
    reasons = dict(evidence=evidence, factors=factors)
    picture = draw_detections(**sample, detections=detections, classes=["person"], **reasons)
    pixels = np.asarray(picture)
    assert picture.width == 3 * 400 + 2 * 4
    for place, kind in enumerate(FOUND_BY.values()):
        assert (pixels[60 + 90 * place, [10, 414, 818]] == COLOURS[kind]).all(), kind
    assert pixels[390, 820].sum() < pixels[390, 1200].sum()  # MSP's factor grows to the right


def test_as_a_command(build, tmp_path, capsys):
    detector = build(classes=("person",))
    torch.save({"model_kwargs": detector.kwargs, "model": detector.state_dict(), "ema": None}, tmp_path / "best.pt")
    for name in ("visible", "infrared"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (80, 60), (90, 60, 30)).save(tmp_path / name / "a.png")
    flags = ["--checkpoint", tmp_path / "best.pt", "--output", tmp_path / "out", "--device", "cpu", "--explain"]
    flags += ["--min-score", "0", "--visible", tmp_path / "visible"]
    assert "nothing to show of one camera" in refused(capsys, predict.main, *flags)
    predict.main([str(flag) for flag in [*flags, "--infrared", tmp_path / "infrared"]])
    (row,) = json.loads((tmp_path / "out/detections.json").read_text())
    assert {"score", "score_visible_alone", "score_infrared_alone"} < row["detections"][0].keys()
    assert (row["visible"], row["infrared"]) == ("../visible/a.png", "../infrared/a.png")
