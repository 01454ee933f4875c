"""Drawn pairs: visible and infrared images of people among things that resemble them.

Some people are seen only in visible light, some only in infrared. Pair i draws from its own numpy stream, seeded by
(seed, i), and all arithmetic is correctly rounded: every pair is the same on every machine.
"""

from collections.abc import Sequence

import numpy as np
import torch

from macl.data.annotation import Annotation, check_person
from macl.data.painting import paint
from macl.data.pairs import Pair, PairedDataset
from macl.data.scenes import NIGHT, Domain, Scene, lay_out

# Hidden shares above which occlusion is partial, is heavy, and is too much to learn from.
PARTIAL, HEAVY, IGNORED = 0.05, 0.5, 0.7


class SyntheticPairs(PairedDataset):
    """`count` drawn pairs as samples (see macl.data.sample), all keys known; each pair is a scene of its own.

    seed: an integer >= 0
    size: (H, W) in pixels
    domain: NIGHT, stage 1's registered night scenes after LLVIP; or DAY_AND_NIGHT, stage 2's streets after KAIST, two
        kinds in turn
    classes: the names of labels 1, 2, ..., person among them
    """

    def __init__(
        self, count: int, seed: int, *, size: tuple[int, int] = (128, 160),
        domain: Domain | tuple[Domain, ...] = NIGHT, classes: Sequence[str] = ("person",),
    ):  # fmt: skip
        check_person(classes, "the drawn scenes")
        self.seed, self.size = seed, size
        self.domains = (domain,) if isinstance(domain, Domain) else tuple(domain)
        daytimes = [self.domains[index % len(self.domains)].daytime for index in range(count)]
        pairs = [Pair(f"synthetic/{seed}/{index:06d}", None, None, index, day) for index, day in enumerate(daytimes)]
        source = f"synthetic pairs: {count} scenes of {size[1]} x {size[0]} pixels drawn from seed {seed}"
        source += f", {sum(daytimes)} of them by day" if any(daytimes) else ""
        super().__init__(pairs, classes, split="drawn scenes", source=source)

    def __getitem__(self, index: int) -> dict:
        rng, domain, scene = self.layout(index)
        images = zip(("visible", "infrared"), map(torch.from_numpy, paint(rng, domain, scene)), strict=True)
        return self.sample(index, dict(images), self._annotate(index, domain, scene))

    def annotation(self, index: int) -> Annotation:
        _, domain, scene = self.layout(index)
        return self._annotate(index, domain, scene)

    def layout(self, index: int) -> tuple[np.random.Generator, Domain, Scene]:
        """Everything that stands in a scene, without its pixels, and the generator that goes on to draw them."""
        number = self.pairs[index].scene
        rng, domain = np.random.default_rng((self.seed, number)), self.domains[number % len(self.domains)]
        return rng, domain, lay_out(rng, domain, self.size)

    def _annotate(self, index: int, domain: Domain, scene: Scene) -> Annotation:
        people = [figure for figure in scene.figures if figure.kind == "person"]
        boxes = torch.tensor([figure.box for figure in people], dtype=torch.float32).reshape(-1, 4)
        hidden = torch.tensor([figure.hidden for figure in people], dtype=torch.float64)
        return Annotation(
            place=self.pairs[index].visible,
            size=self.size[::-1],
            names=["person"] * len(people),
            boxes=boxes,
            labels=torch.full((len(people),), 1 + self.classes.index("person"), dtype=torch.int64),
            ignore=(hidden > IGNORED) | (boxes[:, 3] - boxes[:, 1] < domain.ignored_below * self.size[0]),
            occlusion=(hidden > PARTIAL).long() + (hidden > HEAVY).long(),
            visible_in=torch.tensor([figure.seen for figure in people], dtype=torch.bool).reshape(-1, 2),
        )
