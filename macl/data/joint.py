"""Two data sets as one, for training on both at once."""

import bisect

from torch.utils.data import ConcatDataset, Dataset


class JointDataset(ConcatDataset):
    """Data sets laid end to end. "domain" in a sample is the index of its data set.

    Scene numbers are made unique across the data sets; -1, unknown, stays.
    """

    def __init__(self, *parts: Dataset):
        super().__init__(parts)
        self.source = " and ".join(part.source for part in parts)

    def __getitem__(self, index: int) -> dict:
        sample, domain = super().__getitem__(index), bisect.bisect(self.cumulative_sizes, index)
        scene = sample["scene"]
        return sample | {"domain": domain, "scene": scene if scene < 0 else scene * len(self.datasets) + domain}

    def decoded_at(self, short_side: int) -> "JointDataset":
        """See `PairedDataset.decoded_at`."""
        return JointDataset(*(part.decoded_at(short_side) for part in self.datasets))
