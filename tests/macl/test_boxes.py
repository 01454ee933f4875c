import pytest
import torch

from macl.boxes import BELOW, BETWEEN, BoxCoder, match
from macl.data import PairedAugmentation


def test_a_decoded_side_grows_by_at_most_a_thousand_sixteenths():
    grown = BoxCoder((1.0, 1.0, 1.0, 1.0)).decode(torch.tensor([[0.0, 0, 9, 9]]), torch.tensor([[0.0, 0, 16, 16]]))
    assert grown[0, 2] - grown[0, 0] == pytest.approx(1000.0)


def test_boxes_of_which_half_is_ignored_are_left_out():
    boxes = torch.tensor([[0.0, 0, 10, 10], [4.5, 0, 14.5, 10], [5.5, 0, 15.5, 10]])
    matched = match(boxes, torch.zeros(0, 4), foreground=0.5, background=0.3, keep_best=False,
                    ignore=torch.tensor([[0.0, 0, 10, 10]]))  # fmt: skip
    assert matched.tolist() == [BETWEEN, BETWEEN, BELOW]


def test_infrared_noise_is_of_every_strength():
    sample = {name: torch.full((3, 32, 32), 128, dtype=torch.uint8) for name in ("visible", "infrared")}
    sample |= {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "ignore": torch.zeros(0).bool()}
    draw = PairedAugmentation(noise=0.1)
    strengths = [draw(sample)["infrared"].std().item() for _ in range(40)]
    assert min(strengths) < 0.03 and 0.07 < max(strengths) < 0.12
