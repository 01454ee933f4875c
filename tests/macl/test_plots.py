"""Pictures: what is drawn where, and what happens without the extra."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from macl.metrics import miss_rate_curve
from macl.plots import COLOURS, DIVIDER, MIN_SIDE, draw_detections, miss_rate_plot, tsne_picture
from trainkit.errors import InputError

EMPTY = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}


def detections(*boxes, scores=None):
    boxes = torch.tensor(boxes, dtype=torch.float32)
    return {
        "boxes": boxes,
        "scores": torch.tensor(scores or [0.9] * len(boxes)),
        "labels": torch.ones(len(boxes)).long(),
    }


def coloured(picture, kind):
    """Mask (H, W) of the pixels of exactly this colour."""
    return (np.asarray(picture) == COLOURS[kind]).all(2)


def test_both_modalities_side_by_side_with_the_same_boxes():
    visible, infrared = torch.zeros(3, 128, 160), torch.ones(1, 128, 160)
    picture = draw_detections(visible, infrared, detections([40, 50, 80, 110]))
    width = 3 * 160
    assert picture.width == 2 * width + DIVIDER and picture.height > 3 * 128 == MIN_SIDE
    left, right = picture.crop((0, 0, width, 384)), picture.crop((width + DIVIDER, 0, picture.width, 384))
    for panel in (left, right):
        rows, columns = np.nonzero(coloured(panel, "detection"))
        assert (columns.min(), columns.max(), rows.max()) == (120, 240, 330)
        assert rows.min() < 150  # the label stands above the box
    assert left.getpixel((10, 380)) == (0, 0, 0) and right.getpixel((10, 380)) == (255, 255, 255)


def test_one_modality_of_a_large_image_is_not_enlarged():
    picture = draw_detections(None, Image.new("L", (640, 512), 128), EMPTY)
    assert picture.width == 640 and 512 < picture.height < 560
    assert picture.getpixel((300, 300)) == (128, 128, 128)


def test_ground_truth_and_ignored_boxes_differ_from_detections():
    image = torch.zeros(3, 400, 400)
    truth = {"boxes": torch.tensor([[50.0, 50, 150, 150], [200, 200, 300, 300]]), "ignore": torch.tensor([False, True])}
    picture = draw_detections(image, None, EMPTY, truth).crop((0, 0, 400, 400))
    assert coloured(picture, "ground truth")[50, 50:151].all()
    dashes = coloured(picture, "ignored")[200, 200:300]
    assert 0.3 < dashes.mean() < 0.7
    assert not coloured(picture, "detection").any()


def test_low_scores_are_left_out():
    image = torch.zeros(3, 400, 400)
    found = detections([50, 50, 100, 100], [200, 200, 300, 300], scores=[0.2, 0.8])
    drawn = coloured(draw_detections(image, None, found).crop((0, 0, 400, 400)), "detection")
    assert not drawn[:120, :120].any() and drawn[250, 200]
    assert coloured(draw_detections(image, None, found, min_score=0.1), "detection")[75, 50]


def test_labels_stay_inside_the_picture():
    image = torch.zeros(3, 400, 400)
    corners = [[0, 0, 30, 30], [390, 0, 400, 60], [-20, 380, 10, 420]]
    named = draw_detections(image, None, detections(*corners), classes=("person",)).crop((0, 0, 400, 400))
    labels = coloured(named, "detection")
    plain = coloured(draw_detections(image, None, detections(*corners)).crop((0, 0, 400, 400)), "detection")
    assert labels[:30, 300:].sum() > 1.5 * plain[:30, 300:].sum()  # the name takes room, to the left of the border
    assert labels[360:380, :40].any()


def test_pictures_of_nothing_or_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match="needs a visible or an infrared image"):
        draw_detections(None, None, EMPTY)
    with pytest.raises(ValueError, match="differ in size: 20x10 and 30x10"):
        draw_detections(torch.zeros(3, 10, 20), torch.zeros(3, 10, 30), EMPTY)
    with pytest.raises(ValueError, match=r"an image is \(2, 10, 20\)"):
        draw_detections(torch.zeros(2, 10, 20), None, EMPTY)


def without(monkeypatch, name):
    """Make ``import name`` and its modules fail, as where it is not installed."""
    for module in [name, *(loaded for loaded in sys.modules if loaded.startswith(f"{name}."))]:
        monkeypatch.setitem(sys.modules, module, None)


@pytest.mark.parametrize("name", ["matplotlib", "sklearn"])
def test_a_missing_extra_is_named(tmp_path, monkeypatch, name):
    without(monkeypatch, name)
    with pytest.raises(InputError, match=r"a t-SNE picture needs .*viz extra brings: pip install -e '\.\[viz\]'"):
        tsne_picture(tmp_path / "a.png", torch.eye(3), torch.eye(3))
    if name == "matplotlib":
        with pytest.raises(InputError, match="a plot of the miss rate needs .*viz extra"):
            miss_rate_plot(tmp_path / "a.png", {})
    assert not list(tmp_path.iterdir())


@pytest.fixture
def viz():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")


@pytest.mark.parametrize("count", [2, 3, 10])
def test_tsne_of_few_pairs(viz, tmp_path, count, recwarn):
    torch.manual_seed(0)
    x = torch.randn(count, 8)
    assert tsne_picture(tmp_path / "a.png", x, x + 0.1)
    assert tsne_picture(tmp_path / "b.png", x, x + 0.1)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (840, 840)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()  # the seed is fixed
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tsne_of_collapsed_embeddings(viz, tmp_path, dtype, recwarn):
    x = torch.ones(6, 8, dtype=dtype)
    assert tsne_picture(tmp_path / "a.png", x, x)
    assert [str(warning.message) for warning in recwarn] == []


def test_tsne_of_less_than_two_pairs_is_not_drawn(viz, tmp_path):
    assert not tsne_picture(tmp_path / "a.png", torch.ones(1, 4), torch.ones(1, 4))
    assert not list(tmp_path.iterdir())


def test_the_miss_rate_plot_takes_curves_with_and_without_points(viz, tmp_path, recwarn):
    person = {"boxes": [[100, 100, 140, 200]], "ignore": [False], "occlusion": [0]}
    found = {"boxes": [[100, 100, 140, 200], [300, 100, 340, 200]], "scores": [0.5, 0.9]}
    nothing = {"boxes": [], "scores": []}
    curves = {
        "half": miss_rate_curve([found, nothing], [person, person]),
        "nothing": miss_rate_curve([nothing], [person]),
        "no people": miss_rate_curve([nothing], [{"boxes": [], "ignore": [], "occlusion": []}]),
    }
    assert curves["no people"]["log_average_miss_rate"] is None
    miss_rate_plot(tmp_path / "curves.png", curves, title="test")
    miss_rate_plot(tmp_path / "empty.png", {})
    curves_size, empty_size = ((tmp_path / name).stat().st_size for name in ("curves.png", "empty.png"))
    assert curves_size > empty_size > 0
    assert [str(warning.message) for warning in recwarn] == []
