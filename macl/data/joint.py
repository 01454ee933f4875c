"""Two data sets as one, for training on both at once."""

from torch.utils.data import Dataset


class Joint(Dataset):
    """Data sets laid end to end. Samples also say which one they are of: "domain", from 0.

    Scene numbers stay apart: a scene of one data set never has the number of one of another; -1, not known, stays.
    """

    def __init__(self, *parts: Dataset):
        self.parts = parts
        self.source = " and ".join(part.source for part in parts)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: int) -> dict:
        index = range(len(self))[index]
        for domain, part in enumerate(self.parts):
            if index < len(part):
                sample = part[index]
                scene = sample["scene"]
                return sample | {"domain": domain, "scene": scene if scene < 0 else scene * len(self.parts) + domain}
            index -= len(part)
