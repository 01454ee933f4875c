"""Two data sets as one."""

import pytest

from macl.data import DAY_AND_NIGHT, JointDataset, SyntheticPairs


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


def test_unknown_scenes_stay_so():
    joint = JointDataset(SyntheticPairs(2, 0), SyntheticPairs(1, 0))
    joint.datasets[1].sample = lambda index, *_: {"scene": -1}
    assert [joint[index]["scene"] for index in range(3)] == [0, 2, -1]
