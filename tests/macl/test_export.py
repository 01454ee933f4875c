"""The detector with fixed numbers of rows, its parts, and the files that `python -m macl.export` writes."""

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import scripts
import torch
from PIL import Image
from torchvision.ops import batched_nms

import kernels
import macl
from macl import export
from macl.backbone import MODALITIES
from macl.data import SyntheticPairs, to_float
from macl.static import StaticDetector, survivors

SIZES = ((64, 96), (60, 80), (97, 130))


def spread(detector: macl.PairedFasterRCNN) -> macl.PairedFasterRCNN:
    """With scores far from each other, so that much is found and rounding decides nothing."""
    with torch.no_grad():
        for name, factor in (("cls_score", 30), ("bbox_pred", 3)):
            getattr(detector.roi_head, name).weight.mul_(factor)
        for layer in (detector.rpn.head.cls_logits, detector.rpn.head.bbox_pred):
            layer.weight.mul_(10)
    return detector.eval()


def drawn(size, count=2, cameras=MODALITIES) -> dict[str, list[torch.Tensor]]:
    pairs = SyntheticPairs(count, 7, size=size)
    return {name: [to_float(sample[name]) for sample in pairs] for name in cameras}


def differences(run, detector, images) -> tuple[int, torch.Tensor]:
    """Number of detections, and the largest differences in pixels and in scores."""
    rows = run(**{name: torch.stack(given) for name, given in images.items()})
    expected, most = detector(**images), torch.zeros(2)
    for *parts, number, one in zip(*rows, expected, strict=True):
        assert not any(part[number:].any() for part in parts)
        found = dict(zip(export.OUTPUTS, (part[:number] for part in parts), strict=False))
        most = torch.maximum(most, export.difference(found, one))
    return sum(len(one["scores"]) for one in expected), most


@pytest.mark.parametrize("iou", [0.3, 0.7])
def test_survivors_are_those_of_torchvision(iou):
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(3, 90, 2, generator=generator) * 40
    boxes = torch.cat([corner, corner + 5 + 20 * torch.rand(3, 90, 2, generator=generator)], dim=2)
    scores = torch.rand(3, 90, generator=generator)
    scores[:, ::4], scores[2] = -1, -1
    kept = survivors(boxes, scores, iou)
    for rows, values, keeps in zip(boxes, scores, kept, strict=True):
        (there,) = torch.where(values >= 0)
        expected = there[batched_nms(rows[there], values[there], torch.zeros_like(there), iou)]
        assert torch.where(keeps)[0].tolist() == expected.sort().values.tolist()
    assert 0 < kept.sum() < (scores >= 0).sum()


def test_one_map_pools_as_the_operator_does_also_narrow_boxes_at_the_border(build):
    model, generator = build(), torch.Generator().manual_seed(1)
    levels = [torch.randn(2, 32, 32 // 2**level, 48 // 2**level, generator=generator) for level in range(3)]
    corner = torch.rand(2, 40, 2, generator=generator) * torch.tensor([180.0, 120.0])
    boxes = torch.cat([corner, corner + 250 * torch.rand(2, 40, 2, generator=generator) ** 3], dim=2)
    boxes = boxes.minimum(torch.tensor([192.0, 128.0, 192.0, 128.0]))
    narrow = [[189.5, 3, 192, 100], [191.9, 127.5, 192, 128], [0, 126, 190, 128], [0, 0, 192, 128], [190, 0, 191, 1]]
    boxes = torch.cat([boxes, torch.tensor(narrow).expand(2, -1, -1)], dim=1)
    rois = torch.cat([torch.arange(2.0).repeat_interleave(45)[:, None], boxes.flatten(0, 1)], dim=1)
    expected = kernels.multiscale_roi_align(levels, rois, scales=model.roi_head.scales, output_size=7)
    assert (expected[-5:] == 0).any()  # samples beyond the map
    torch.testing.assert_close(StaticDetector(model).pool(levels, boxes), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "kwargs",
    [
        dict(merge="logit", classes=("person", "car")),
        dict(merge="logit", norm="modality_batch", min_size=80, max_size=100, max_detections=12),
        dict(norm="frozen_batch", fpn_levels=5, min_size=(48, 64), rpn_post_nms=(50, 200)),
        dict(merge="logit", fusion="infrared", score_threshold=0.4),
    ],
    ids=str,
)
def test_fixed_rows_hold_what_the_detector_finds(build, kwargs):
    detector = spread(build(**kwargs))
    found = 0
    for size in SIZES:
        for cameras in (MODALITIES, ("infrared",)):
            count, most = differences(StaticDetector(detector), detector, drawn(size, cameras=cameras))
            found += count
            assert most[0] < 1e-3 and most[1] < 1e-4, (size, cameras, most)
    assert found > 40


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    detector = macl.build_detector(
        backbone="resnet18", norm="group", fpn_channels=16, fpn_levels=3, anchor_sizes=(16, 32, 64), merge="logit",
        aspect_ratios=(2.0,), head_width=32, rpn_pre_nms=(100, 50), rpn_post_nms=(50, 40), macl_level="none",
        classes=("person", "car"), min_size=72,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("export") / "best.pt"
    state = spread(detector).state_dict()
    torch.save({"model_kwargs": detector.kwargs, "model": state, "ema": None, "register": "none"}, path)
    return path


@pytest.fixture(scope="module")
def file(checkpoint):
    """An ONNX file, as the command writes it."""
    path = checkpoint.with_name("detector.onnx")
    export.main(["--checkpoint", str(checkpoint), "--output", str(path)])
    return path


@pytest.mark.slow
@torch.no_grad()
def test_an_onnx_file_finds_what_the_detector_finds(file, checkpoint):
    onnx = pytest.importorskip("onnx")
    detector, run, found = macl.load_detector(checkpoint), export.onnx_function(file.read_bytes()), 0
    for size, count in zip(SIZES, (7, 1, 12), strict=True):
        number, most = differences(run, detector, drawn(size, count))
        found += number
        assert most[0] < 1e-3 and most[1] < 1e-4, (size, most)
    assert found > 100
    model = onnx.load(file)
    assert {node.domain for node in model.graph.node} == {""} and not model.functions
    assert [one.name for one in model.graph.input] == list(MODALITIES)
    facts = {one.key: json.loads(one.value) for one in model.metadata_props}
    assert facts["classes"] == ["person", "car"] and facts["cameras"] == list(MODALITIES) and facts["min_size"] == 72
    assert facts["score_threshold"] == 0.05 and len(facts["infrared_mean"]) == len(facts["visible_std"]) == 3


@pytest.mark.slow
def test_a_file_of_other_weights_is_not_left(file, checkpoint, tmp_path, monkeypatch, capsys):
    content = torch.load(checkpoint, weights_only=True)
    content["model"]["backbone.layer1.0.conv1.weight"][0, 0, 1, 1] += 0.5
    torch.save(content, tmp_path / "other.pt")
    run = export.onnx_function(file.read_bytes())
    monkeypatch.setattr(export, "exported", lambda *_: (file.read_bytes(), run))
    flags = ["--output", tmp_path / "other.onnx", "--checkpoint"]
    assert "nothing is written" in scripts.refused(capsys, export.main, *flags, tmp_path / "other.pt")
    assert not list(tmp_path.glob("other.onnx*"))
    export.main([*map(str, flags), str(checkpoint)])
    assert (tmp_path / "other.onnx").read_bytes() == file.read_bytes()


@pytest.mark.slow
@torch.no_grad()
def test_the_documents_example_needs_neither_torch_nor_this_project(file, checkpoint):
    text = (Path(__file__).parents[2] / "docs/export.md").read_text()
    code = textwrap.dedent(re.search(r"^    import json\n(?:(?:    .*)?\n)+", text, re.MULTILINE)[0])
    images = drawn((64, 96), 1)
    for name, (image,) in images.items():
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(file.with_name(f"{name}.png"))
    forbidden = ("torch", "torchvision", "macl", "fgclip", "kernels", "trainkit")
    code = f"import sys\nsys.modules.update(dict.fromkeys({forbidden}))\n{code}"
    command = [sys.executable, "-I", "-W", "error", "-c", code]
    lines = subprocess.run(command, cwd=file.parent, check=True, capture_output=True, text=True).stdout.splitlines()
    (expected,) = macl.load_detector(checkpoint)(**images)
    names = [("person", "car")[label - 1] for label in expected["labels"]]
    assert len(lines) == len(names) > 3 and [line.split()[0] for line in lines] == names


@pytest.mark.slow
@torch.no_grad()
def test_a_program_of_torch_takes_any_number_and_size(checkpoint, tmp_path, capsys):
    path, content = tmp_path / "infrared.pt2", torch.load(checkpoint, weights_only=True)
    content["model_kwargs"] |= dict(min_size=None)
    checkpoint = tmp_path / "best.pt"
    torch.save(content, checkpoint)
    flags = ["--checkpoint", str(checkpoint), "--output", str(path), "--cameras", "infrared", "--min-score", "0.2"]
    export.main(flags)
    assert "detections in drawn images differ by at most" in capsys.readouterr().out
    extra = {"metadata.json": ""}
    run, detector = torch.export.load(path, extra_files=extra).module(), macl.load_detector(checkpoint)
    detector.roi_head.score_threshold = 0.2
    for size, count in zip(SIZES, (1, 2, 3), strict=True):
        _, most = differences(run, detector, drawn(size, count, ("infrared",)))
        assert most[0] < 1e-3 and most[1] < 1e-4, (size, most)
    assert json.loads(extra["metadata.json"])["score_threshold"] == 0.2


def test_what_does_not_fit_is_refused(checkpoint, tmp_path, capsys, monkeypatch):
    def refused(*flags) -> str:
        return scripts.refused(capsys, export.main, "--checkpoint", checkpoint, *flags)

    assert "ends in .onnx or .pt2" in refused("--output", tmp_path / "a.pth")
    assert "a folder that exists" in refused("--output", tmp_path / "none" / "a.onnx")
    content = torch.load(checkpoint, weights_only=True)
    content["model_kwargs"]["fusion"] = "visible"
    torch.save(content, tmp_path / "one.pt")
    flags = ["--output", tmp_path / "a.pt2", "--cameras", "both", "--checkpoint", tmp_path / "one.pt"]
    assert "sees with visible images alone" in scripts.refused(capsys, export.main, *flags)
    monkeypatch.setattr("trainkit.onnx_file.find_spec", lambda name: None if name == "onnxscript" else name)
    assert refused("--output", tmp_path / "a.onnx").endswith('need onnxscript: pip install "macl-fgclip[export]"')
    assert not list(tmp_path.glob("a.*"))
