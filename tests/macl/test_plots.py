"""Pictures: what is drawn where."""

import numpy as np
import pytest
import torch
from pairs import found, truth
from PIL import Image

from macl import plots
from macl.metrics import miss_rate_curve
from macl.plots import COLOURS, draw_detections, draw_validation, miss_rate_plot, tsne_picture
from trainkit.drawing import DIVIDER, MIN_SIDE

BLACK = torch.zeros(3, 400, 400, dtype=torch.uint8)


def draw(visible, infrared, *arguments, classes=("person",), **options):
    return draw_detections(visible, infrared, *arguments, classes=classes, **options)


def coloured(picture, kind):
    """Mask (H, W) of the pixels of exactly this colour."""
    return (np.asarray(picture) == COLOURS[kind]).all(2)


def test_both_modalities_side_by_side_with_the_same_boxes():
    visible = torch.zeros(3, 128, 160, dtype=torch.uint8)
    picture = draw(visible, visible + 255, found([40, 50, 80, 110]))
    width = 3 * 160
    assert picture.width == 2 * width + DIVIDER and picture.height > 3 * 128 == MIN_SIDE
    left, right = picture.crop((0, 0, width, 384)), picture.crop((width + DIVIDER, 0, picture.width, 384))
    for panel in (left, right):
        mask = coloured(panel, "detection")
        assert mask[150:331, [120, 240]].all() and mask[330, 120:241].all() and not mask[160:320, 130:230].any()
        assert mask[135:149, 122:160].any()  # the label stands above the box
    assert left.getpixel((10, 380)) == (0, 0, 0) and right.getpixel((10, 380)) == (255, 255, 255)


def test_one_modality_of_a_large_image_is_not_enlarged():
    picture = draw(None, torch.full((3, 512, 640), 128, dtype=torch.uint8), found())
    assert picture.width == 640 and 512 < picture.height < 560
    assert picture.getpixel((300, 300)) == (128, 128, 128)


def test_ground_truth_and_ignored_boxes_differ_from_detections():
    true = truth([50, 50, 150, 150], [200, 200, 300, 300], ignore=[1])
    picture = draw(BLACK, None, found(), true).crop((0, 0, 400, 400))
    assert coloured(picture, "ground truth")[50, 50:151].all() and coloured(picture, "ignored")[200, 200:301].all()
    assert not coloured(picture, "detection").any()
    assert not coloured(picture, "ground truth")[152:175].any()  # one class needs no name, ...
    several = coloured(draw(BLACK, None, found(), true, classes=("car", "person")), "ground truth")
    assert several[152:175, 50:70].any()  # ... of several each true box shows its own, below


def test_low_scores_are_left_out():
    boxes = found([50, 50, 100, 100], [200, 200, 300, 300], scores=[0.2, 0.8])
    drawn = coloured(draw(BLACK, None, boxes).crop((0, 0, 400, 400)), "detection")
    assert not drawn[:120, :120].any() and drawn[250, 200]
    assert coloured(draw(BLACK, None, boxes, min_score=0.1), "detection")[75, 50]


def test_labels_stay_inside_the_picture():
    corners = [[0, 0, 30, 30], [390, 0, 400, 60], [-20, 380, 10, 420]]
    drawn = coloured(draw(BLACK, None, found(*corners)).crop((0, 0, 400, 400)), "detection")
    assert drawn[:10, 320:390].sum() > 200  # to the left of the border
    assert drawn[360:380, :40].any()


@pytest.fixture
def viz():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")


@pytest.mark.parametrize("extra", [True, False])
def test_pictures_of_a_validation(viz, tmp_path, monkeypatch, extra):
    monkeypatch.setattr(plots, "find_spec", lambda name: extra)
    one = {"detections": {"both": found([5, 5, 9, 9])}, "classes": ["person"]}
    one |= {"ground_truth": truth([5, 5, 9, 9])}
    results = [one | {"embeddings": (*torch.randn(2, 1, 4), torch.ones(1).bool())} for _ in range(13)]
    draw_validation(tmp_path, 2, [{"visible": BLACK, "infrared": BLACK}] * 13, results)
    drawn = [f"validation-{index}.png" for index in (0, 3, 6, 9, 12)] + ["tsne-002.png"] * extra
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == set(drawn)
    picture = Image.open(tmp_path / "pictures/validation-12.png")
    assert coloured(picture, "detection").any() and coloured(picture, "ground truth").any()


def test_tsne_of_few_pairs_and_of_collapsed_embeddings(viz, tmp_path, recwarn):
    torch.manual_seed(0)
    inputs = {"2": torch.randn(2, 8), "10": torch.randn(10, 8), "collapsed": torch.ones(6, 8), "1": torch.ones(1, 8)}
    for folder in (tmp_path / "first", tmp_path / "again"):
        folder.mkdir()
        for name, x in inputs.items():
            tsne_picture(folder / f"{name}.png", x, x, title="")
    first, again = ({path.stem: path.read_bytes() for path in place.iterdir()} for place in tmp_path.iterdir())
    assert first == again and set(first) == {"2", "10", "collapsed"}  # the seed is fixed, one pair gives no picture
    with Image.open(tmp_path / "first/2.png") as picture:
        assert picture.size == (840, 840)
    assert [str(warning.message) for warning in recwarn] == []


def test_the_miss_rate_plot_takes_curves_with_and_without_points(viz, tmp_path, recwarn):
    person = {"boxes": [[100, 100, 140, 200]], "ignore": [False], "occlusion": [0]}
    found = {"boxes": [[100, 100, 140, 200], [300, 100, 340, 200]], "scores": [0.5, 0.9]}
    nothing = {"boxes": [], "scores": []}
    curves = {
        "half": miss_rate_curve([found, nothing], [person, person]),
        "nothing": miss_rate_curve([nothing], [person]),
        "no people": miss_rate_curve([nothing], [{"boxes": [], "ignore": [], "occlusion": []}]),
    }
    miss_rate_plot(tmp_path / "curves.png", curves, title="test")
    miss_rate_plot(tmp_path / "empty.png", {})
    assert (tmp_path / "curves.png").stat().st_size > (tmp_path / "empty.png").stat().st_size > 0
    assert [str(warning.message) for warning in recwarn] == []
