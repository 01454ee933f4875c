"""Two data sets as one, for training on both at once."""

import bisect
import itertools

from torch.utils.data import Dataset


class JointDataset(Dataset):
    """Data sets laid end to end. Samples also say which one they are of: "domain", from 0.

    Scene numbers stay apart: a scene of one data set never has the number of one of another; -1, not known, stays.
    """

    def __init__(self, *parts: Dataset):
        self.parts = parts
        self.starts = [0, *itertools.accumulate(map(len, parts))]
        self.source = " and ".join(part.source for part in parts)

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> dict:
        index = range(len(self))[index]
        domain = bisect.bisect(self.starts, index) - 1
        sample = self.parts[domain][index - self.starts[domain]]
        scene = sample["scene"]
        return sample | {"domain": domain, "scene": scene if scene < 0 else scene * len(self.parts) + domain}

    def beside(self, index: int) -> range:
        """The indices of the data set that `index` belongs to."""
        stop = bisect.bisect(self.starts, index)
        return range(self.starts[stop - 1], self.starts[stop])
