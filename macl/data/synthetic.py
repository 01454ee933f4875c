"""Scenes drawn by the project: pairs of visible and infrared images of people among things that resemble them.

Some people can be seen only in visible light (as warm as what is behind them) and some only in infrared (as dark as
what is behind them). Pair i draws from its own numpy stream, seeded by (seed, i), and all arithmetic is correctly
rounded, so that every pair is the same on every machine, whatever was drawn before it.

NIGHT is what a detector is first trained on: registered pairs of night scenes, after LLVIP. DAY_AND_NIGHT is what it
is fine-tuned to: other cameras on streets by day and by night, after KAIST.
"""

from collections.abc import Sequence

import numpy as np
import torch

from macl.data.occurrence import label_of_people
from macl.data.painting import paint
from macl.data.scenes import INFRARED, NIGHT, VISIBLE, Domain, Figure, Scene, lay_out
from trainkit.errors import InputError

PARTIAL, HEAVY, IGNORED = (
    0.05,
    0.5,
    0.7,
)  # hidden shares above which occlusion is partial, heavy, too much to learn from


class SyntheticPairs(torch.utils.data.Dataset):
    """`count` drawn pairs as samples (see macl.data.sample), all keys known; each pair is a scene of its own.

    seed: an integer >= 0; other seeds give other scenes. size: (H, W) in pixels. domain: what the scenes look like, one
    kind, or several kinds in turn. People of whom more than 70 % is hidden, and those below the domain's height, are
    ignored. classes: the names that labels stand for. Raises InputError for a count below 1, a negative seed, and
    classes without person.
    """

    def __init__(
        self,
        count: int,
        seed: int,
        *,
        size: tuple[int, int] = (128, 160),
        domain: Domain | tuple[Domain, ...] = NIGHT,
        classes: Sequence[str] = ("person",),
    ):
        if count < 1:
            raise InputError(f"a synthetic data set of {count} pairs was asked for; expected at least 1")
        if seed < 0:
            raise InputError(f"the synthetic data set's seed is {seed}; expected 0 or more")
        self.count, self.seed, self.size, self.classes = count, seed, size, tuple(classes)
        self.person = label_of_people(classes, "the drawn scenes")
        self.domains = (domain,) if isinstance(domain, Domain) else tuple(domain)
        by_day = sum(self.domain(index).daytime for index in range(count))
        self.source = f"synthetic pairs: {count} scenes of {size[1]} x {size[0]} pixels drawn from seed {seed}"
        self.source += f", {by_day} of them by day" if by_day else ""

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        index = range(self.count)[index]
        rng, domain = np.random.default_rng((self.seed, index)), self.domain(index)
        scene = lay_out(rng, domain, self.size)
        visible, infrared = paint(rng, domain, scene)
        people = [figure for figure in scene.figures if figure.kind == "person"]
        hidden = torch.tensor([figure.hidden for figure in people], dtype=torch.float64)
        return {
            "visible": torch.from_numpy(visible),
            "infrared": torch.from_numpy(infrared),
            "boxes": torch.tensor([figure.box for figure in people], dtype=torch.float32).reshape(-1, 4),
            "labels": torch.full((len(people),), self.person, dtype=torch.int64),
            "ignore": torch.tensor([self._ignores(figure, domain) for figure in people], dtype=torch.bool),
            "image_id": index,
            "path": f"synthetic/{self.seed}/{index:06d}",
            "scene": index,
            "visible_in": torch.tensor([figure.seen for figure in people], dtype=torch.bool).reshape(-1, 2),
            "occlusion": (hidden > PARTIAL).long() + (hidden > HEAVY).long(),
            "daytime": domain.daytime,
        }

    def domain(self, index: int) -> Domain:
        """What scene `index` looks like."""
        return self.domains[index % len(self.domains)]

    def layout(self, index: int) -> Scene:
        """All that stands in a scene, people and other things, without its pixels."""
        index = range(self.count)[index]
        return lay_out(np.random.default_rng((self.seed, index)), self.domain(index), self.size)

    def objects(self, index: int) -> tuple[list[str], set[int]]:
        """The names of all objects of a scene, and the labels that one of them has that is not ignored."""
        people = [figure for figure in self.layout(index).figures if figure.kind == "person"]
        counts = not all(self._ignores(figure, self.domain(index)) for figure in people)
        return ["person"] * len(people), {self.person} if counts else set()

    def _ignores(self, figure: Figure, domain: Domain) -> bool:
        return figure.hidden > IGNORED or figure.box[3] - figure.box[1] < domain.ignored_below * self.size[0]

    def statistics(self) -> dict:
        """The counts of LLVIP.statistics, scenes by day, people seen in both modalities and in only one, and the least
        number of distractors that an image of each modality shows at least by half. No image is painted."""
        scenes = [self.layout(index).figures for index in range(self.count)]
        people = [figure for scene in scenes for figure in scene if figure.kind == "person"]
        ignored = [
            self._ignores(figure, self.domain(index))
            for index, scene in enumerate(scenes)
            for figure in scene
            if figure.kind == "person"
        ]
        heights = sorted(figure.box[3] - figure.box[1] for figure in people)
        distractors = [
            [sum(f.seen[modality] for f in scene if f.is_distractor and f.hidden <= HEAVY) for scene in scenes]
            for modality in (VISIBLE, INFRARED)
        ]
        return {
            "pairs": self.count,
            "scenes": self.count,
            "by_day": sum(self.domain(index).daytime for index in range(self.count)),
            "boxes": len(people),
            "ignored": sum(ignored),
            "clipped": 0,
            "dropped": 0,
            "other_classes": 0,
            "empty_images": sum(not any(figure.kind == "person" for figure in scene) for scene in scenes),
            "min_height": heights[0] if heights else None,
            "median_height": heights[len(heights) // 2] if heights else None,
            "max_height": heights[-1] if heights else None,
            "seen_in_both": sum(figure.seen == (True, True) for figure in people),
            "visible_only": sum(figure.seen == (True, False) for figure in people),
            "infrared_only": sum(figure.seen == (False, True) for figure in people),
            "min_visible_distractors": min(distractors[VISIBLE]),
            "min_infrared_distractors": min(distractors[INFRARED]),
        }
