"""The layout of a drawn scene: people, things that resemble them, and what hides them."""

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from macl.data.figures import DISTRACTORS, distractor, occluder, person, rasterise, uniform

VISIBLE, INFRARED = 0, 1


@dataclass(frozen=True)
class Domain:
    """One kind of scenes. Pairs of numbers are ranges; tones are grey levels of 0..255."""

    daytime: bool = False
    heights: tuple[float, float] = (0.11, 0.66)  # of people, as a share of the image's height
    ignored_below: float = 0.0  # people of less than this share of the image's height are ignored
    visible_only: float = 0.2  # shares of the people, most of them by where they stand
    infrared_only: float = 0.2
    ambient: tuple[float, float] = (22, 45)  # tone of the unlit ground in visible light
    visible_contrast: tuple[float, float] = (40, 90)
    visible_noise: tuple[float, float] = (3, 6)  # standard deviations
    ground: tuple[float, float] = (60, 95)  # tone of the ground in infrared
    infrared_contrast: tuple[float, float] = (40, 95)
    infrared_noise: tuple[float, float] = (2, 4)
    colder: float = 0.0  # share of scenes whose ground is hotter than people and things
    stripes: float = 0.0  # standard deviation of what each column of the infrared sensor adds
    blur: int = 1  # how often infrared is softened
    offset: tuple[int, int] = (0, 0)  # pixels by which infrared lies lower and further right, give or take one


NIGHT = Domain()

# Other cameras: smaller people; infrared with less contrast, softer, striped, and shifted, as the cameras stand side by
# side. By day the visible image shows more people, and the ground may be hotter.
STREET_NIGHT = Domain(
    heights=(0.08, 0.38), ignored_below=0.1, visible_only=0.1, infrared_only=0.3, visible_contrast=(30, 80),
    visible_noise=(4, 8), ground=(80, 120), infrared_contrast=(22, 60), infrared_noise=(3, 5), stripes=3.0, blur=2,
    offset=(1, 3),
)  # fmt: skip
STREET_DAY = replace(
    STREET_NIGHT, daytime=True, visible_only=0.3, infrared_only=0.1, ambient=(95, 150), visible_contrast=(35, 80),
    visible_noise=(2, 4), ground=(105, 150), colder=0.6,
)  # fmt: skip
DAY_AND_NIGHT = (STREET_DAY, STREET_NIGHT)
DAY_AND_NIGHT_REGISTERED = tuple(replace(domain, offset=(0, 0)) for domain in DAY_AND_NIGHT)


@dataclass
class Figure:
    """Something that stands in the scene: kind "person", "occluder" or the name of a distractor's shape."""

    kind: str
    seen: tuple[bool, bool]  # in visible light, in infrared
    foot: tuple[float, float]  # x, y in pixels
    height: float  # in pixels
    rows: slice  # of the patch that it covers
    columns: slice
    coverage: np.ndarray  # (h, w) float32 in 0..1
    material: np.ndarray  # (h, w) intp
    hidden: float = 1.0  # share of the silhouette behind nearer figures, in the camera that shows most of it

    @cached_property
    def inside(self) -> np.ndarray:
        """The silhouette, (h, w) bool."""
        return self.coverage > 0.5

    @cached_property
    def box(self) -> tuple[int, int, int, int]:
        """Tight extents x1, y1, x2, y2 of the silhouette within the image, hidden parts included."""
        rows, columns = (np.flatnonzero(self.inside.any(axis=axis)) for axis in (1, 0))
        top, left = self.rows.start, self.columns.start
        return left + int(columns[0]), top + int(rows[0]), left + int(columns[-1]) + 1, top + int(rows[-1]) + 1


@dataclass
class Scene:
    """Flat ground in perspective: a figure of height h has its foot slope * h pixels below the horizon."""

    size: tuple[int, int]  # H, W
    horizon: float
    slope: float
    failed: tuple[tuple[float, float], tuple[float, float]] = ((0, 0), (0, 0))  # columns, see _failed
    figures: list[Figure] = field(default_factory=list)  # from far to near
    buildings: list[tuple[slice, slice]] = field(default_factory=list)  # rows, columns

    def column(self, rng: np.random.Generator) -> float:
        """A column in which something may stand."""
        return uniform(rng, 0.04, 0.96) * self.size[1]

    def stand(self, kind: str, shape: list[tuple], x: float, height: float, *, seen=(True, True), at=None) -> Figure:
        """A figure at column x, at the distance of a figure `at` pixels tall (default: its own height).

        A camera that fails there does not see it, whatever `seen` says.
        """
        foot = (x, self.horizon + self.slope * (height if at is None else at))
        seen = tuple(one and not low <= x < high for one, (low, high) in zip(seen, self.failed, strict=True))
        return Figure(kind, seen, foot, height, *rasterise(shape, foot=foot, height=height, canvas=self.size))


def lay_out(rng: np.random.Generator, domain: Domain, size: tuple[int, int]) -> Scene:
    """Draws who and what stands where, and works out what hides what."""
    scene = Scene(size, uniform(rng, 0.16, 0.32) * size[0], uniform(rng, 1.05, 1.2), _failed(rng, domain, size[1]))
    people = _people(rng, domain, scene)
    things = _occluders(rng, scene, people) + _distractors(rng, domain, scene)
    scene.figures = _far_to_near(people + things, size)
    scene.buildings = [_building(rng, scene) for _ in range(count(rng, 1, 3))]
    return scene


def _failed(rng: np.random.Generator, domain: Domain, width: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """The columns from, to where visible light shows nobody who stands there, and those where infrared does not.

    They lie in different halves of the image, so that one camera sees everybody. (0, 0): the camera fails nowhere.
    """
    failed, start = [], 0.5 if rng.random() < 0.5 else 0.0
    for share in (domain.infrared_only, domain.visible_only):
        wide = uniform(rng, 0.2, 0.4)
        left = start + uniform(rng, 0, 0.5 - wide)
        failed.append((left * width, (left + wide) * width) if rng.random() < 2.5 * share else (0, 0))
        start = 0.5 - start
    return tuple(failed)


def _far_to_near(figures: list[Figure], size: tuple[int, int]) -> list[Figure]:
    """Sorts the figures that reach into an image, and measures what nearer ones hide of each."""
    figures = [figure for figure in figures if figure.inside.any() and any(figure.seen)]
    figures.sort(key=lambda figure: figure.foot[1])
    for modality in (VISIBLE, INFRARED):
        shown = [figure for figure in figures if figure.seen[modality]]
        owner = np.full(size, -1, dtype=np.int16)  # the nearest figure at each pixel
        for number, figure in enumerate(shown):
            owner[figure.rows, figure.columns][figure.inside] = number
        pixels = np.bincount(owner[owner >= 0], minlength=len(shown)).tolist()
        for figure, own in zip(shown, pixels, strict=True):
            figure.hidden = min(figure.hidden, 1 - own / int(np.count_nonzero(figure.inside)))
    return figures


def _building(rng: np.random.Generator, scene: Scene) -> tuple[slice, slice]:
    left, wide = int(uniform(rng, -0.1, 0.9) * scene.size[1]), int(uniform(rng, 0.15, 0.4) * scene.size[1])
    top, floor = int(uniform(rng, 0.0, 0.8) * scene.horizon), int(scene.horizon) + 2
    return slice(top, floor), slice(max(left, 0), min(left + wide, scene.size[1]))


def _people(rng: np.random.Generator, domain: Domain, scene: Scene) -> list[Figure]:
    low, high = (share * scene.size[0] for share in domain.heights)
    visible_only, infrared_only = 0.35 * domain.visible_only, 0.35 * domain.infrared_only
    people = []
    for _ in range(0 if rng.random() < 0.03 else count(rng, 2, 7)):
        height, x = uniform(rng, low, high), scene.column(rng)
        figure, chance = scene.stand("person", person(rng), x, height), rng.random()
        if all(figure.seen):  # one camera may miss a person although it shows what is around
            figure.seen = (not visible_only <= chance < visible_only + infrared_only, chance >= visible_only)
        people.append(figure)
    return people


def _occluders(rng: np.random.Generator, scene: Scene, people: list[Figure]) -> list[Figure]:
    occluders = []
    for behind in people[: count(rng, 0, 1)]:
        low = rng.random() < 0.5
        height = behind.height * (uniform(rng, 0.3, 0.6) if low else uniform(rng, 1.0, 1.4))
        x = behind.foot[0] + uniform(rng, -0.15, 0.15) * behind.height
        occluders.append(scene.stand("occluder", occluder(rng, low), x, height, at=1.02 * behind.height))
    return occluders


def _distractors(rng: np.random.Generator, domain: Domain, scene: Scene) -> list[Figure]:
    """Things that show in visible light and things that show in infrared in turn, a quarter of them in both."""
    low, high = (share * scene.size[0] for share in domain.heights)
    distractors = []
    for number in range(4):
        kind = DISTRACTORS[int(uniform(rng, 0, len(DISTRACTORS)))]
        height, both = uniform(rng, 1.2 * low, 0.8 * high), rng.random() < 0.25
        seen = (both or number % 2 == 0, both or number % 2 == 1)
        distractors.append(scene.stand(kind, distractor(rng, kind), scene.column(rng), height, seen=seen))
    return distractors


def count(rng: np.random.Generator, low: int, high: int) -> int:
    """A whole number between both, each included."""
    return low + int(uniform(rng, 0, high - low + 1))
