"""Two data sets as one."""

import pytest
import torch

from macl.data import DAY_AND_NIGHT, AugmentedDataset, JointDataset, PairedAugmentation, SyntheticPairs


def test_samples_keep_their_order_and_say_where_they_are_from():
    parts = SyntheticPairs(3, 0, domain=DAY_AND_NIGHT), SyntheticPairs(2, 0)
    joint = JointDataset(*parts)
    assert len(joint) == 5 and joint.source == f"{parts[0].source} and {parts[1].source}"
    samples = [joint[index] for index in range(5)]
    assert [sample["domain"] for sample in samples] == [0, 0, 0, 1, 1]
    assert [sample["path"] for sample in samples] == [part[i]["path"] for part in parts for i in range(len(part))]
    assert len({sample["scene"] for sample in samples}) == 5  # though both parts number theirs from 0
    with pytest.raises(IndexError):
        joint[5]


class Flat(torch.utils.data.Dataset):
    """Pairs of one grey value each, of unknown scenes; with `seen`, of what can be seen in which modality."""

    source = "flat"

    def __init__(self, count, grey, **seen):
        self.count, self.grey, self.seen = count, grey, seen

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = torch.full((3, 40, 40), self.grey, dtype=torch.uint8)
        truth = {"boxes": torch.tensor([[1.0, 1, 39, 39]]), "labels": torch.ones(1, dtype=torch.int64)}
        truth |= {"ignore": torch.zeros(1, dtype=torch.bool), "scene": -1, **self.seen}
        return {"visible": image, "infrared": image.clone(), **truth}


def test_mosaics_are_of_one_data_set_and_unknown_scenes_stay_so():
    joint = JointDataset(Flat(3, 255, visible_in=torch.ones(1, 2, dtype=torch.bool)), Flat(2, 0))
    data = AugmentedDataset(joint, PairedAugmentation(mosaic=1.0), seed=0)
    for epoch in range(4):
        for index in range(5):
            sample = data[epoch, index]
            assert sample["domain"] == (index > 2) and set(sample["visible"].unique().tolist()) == {float(index < 3)}
            assert ("visible_in" in sample) == (index < 3) and sample["scene"] == -1
