"""The layout of a drawn scene: people, things that resemble them, and what hides them."""

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from macl.data.figures import DISTRACTORS, Shape, distractor, occluder, person, rasterise, uniform

VISIBLE, INFRARED = 0, 1


@dataclass(frozen=True)
class Domain:
    """One kind of scenes. Pairs of numbers are ranges; tones are grey levels of 0..255."""

    daytime: bool = False
    heights: tuple[float, float] = (0.11, 0.66)  # of people, as a share of the image's height
    ignored_below: float = 0.0  # people of less than this share of the image's height are ignored
    people: tuple[int, int] = (2, 7)
    empty: float = 0.03  # share of scenes without people
    visible_only: float = 0.2  # shares of the people, most of them by where they stand
    infrared_only: float = 0.2
    companions: float = 0.2  # share of the people who stand beside another
    distractors: tuple[int, int] = (4, 5)  # two seen in visible light, two others in infrared, the rest in either
    occluders: tuple[int, int] = (0, 1)
    horizon: tuple[float, float] = (0.16, 0.32)
    ambient: tuple[float, float] = (22, 45)  # tone of the unlit ground in visible light
    sky: float = 0.35  # times the ground's tone
    shadows: float = 0.0  # share of the light that figures keep from the ground at their feet
    lamps: tuple[int, int] = (1, 3)
    lamp: tuple[float, float] = (30, 90)
    vignette: float = 0.35
    visible_contrast: tuple[float, float] = (40, 90)
    visible_noise: tuple[float, float] = (3, 6)  # standard deviations
    ground: tuple[float, float] = (60, 95)  # tone of the ground in infrared
    warm_clutter: tuple[int, int] = (2, 6)
    infrared_contrast: tuple[float, float] = (40, 95)
    infrared_noise: tuple[float, float] = (2, 4)
    colder: float = 0.0  # share of scenes whose ground is hotter than people and things
    stripes: float = 0.0  # standard deviation of what each column of the infrared sensor adds
    blur: int = 1  # how often infrared is softened
    offset: tuple[int, int] = (0, 0)  # pixels by which infrared lies lower and further right than visible
    misregistration: int = 1  # pixels, either way, about the offset


NIGHT = Domain()

# Other cameras: smaller people, more often in groups; infrared with less contrast, softer, striped, and shifted, as
# the cameras stand side by side. By day the visible image shows more people, and the ground may be hotter.
STREET_NIGHT = Domain(
    heights=(0.08, 0.38), ignored_below=0.1, people=(2, 8), visible_only=0.1, infrared_only=0.3, companions=0.4,
    occluders=(0, 2), lamps=(1, 4), visible_contrast=(30, 80), visible_noise=(4, 8), ground=(80, 120),
    infrared_contrast=(22, 60), infrared_noise=(3, 5), stripes=3.0, blur=2, offset=(1, 3), misregistration=1,
)  # fmt: skip
STREET_DAY = replace(
    STREET_NIGHT, daytime=True, visible_only=0.3, infrared_only=0.1, ambient=(95, 150), sky=1.4, shadows=0.4,
    lamps=(0, 0), visible_contrast=(35, 80), visible_noise=(2, 4), ground=(105, 150), colder=0.6,
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

    def stand(self, kind: str, shape: Shape, x: float, height: float, *, seen=(True, True), at=None) -> Figure:
        """A figure at column x, at the distance of a figure `at` pixels tall (default: its own height).

        A camera that fails there does not see it, whatever `seen` says.
        """
        foot = (x, self.horizon + self.slope * (height if at is None else at))
        seen = tuple(one and not low <= x < high for one, (low, high) in zip(seen, self.failed, strict=True))
        return Figure(kind, seen, foot, height, *rasterise(shape, foot=foot, height=height, canvas=self.size))


def lay_out(rng: np.random.Generator, domain: Domain, size: tuple[int, int]) -> Scene:
    """Draws who and what stands where, and works out what hides what."""
    scene = Scene(size, uniform(rng, *domain.horizon) * size[0], uniform(rng, 1.05, 1.2), _failed(rng, domain, size[1]))
    people = _people(rng, domain, scene)
    figures = people + _occluders(rng, domain, scene, people)
    scene.figures = _far_to_near(figures + _distractors(rng, domain, scene, figures), size)
    scene.buildings = [_building(rng, scene) for _ in range(count(rng, (1, 3)))]
    return scene


def _failed(rng: np.random.Generator, domain: Domain, width: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """The columns from, to where visible light shows nobody who stands there, and those where infrared does not.

    They lie in different halves of the image, so that someone sees everybody. From 0 to 0 where a camera does not fail.
    """
    bands = []
    start = 0.5 if rng.random() < 0.5 else 0.0
    for share in (domain.infrared_only, domain.visible_only):
        wide = uniform(rng, 0.2, 0.4) if rng.random() < 2.5 * share else 0.0
        left = (start + uniform(rng, 0, 0.5 - wide)) * width
        bands.append((left, left + wide * width) if wide else (0, 0))
        start = 0.5 - start
    return tuple(bands)


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
    people = []
    for _ in range(0 if rng.random() < domain.empty else count(rng, domain.people)):
        height = uniform(rng, low, high)
        x = _free_place(rng, scene, people, height)
        if people and rng.random() < domain.companions:
            other = people[int(uniform(rng, 0, len(people)))]
            height = min(max(other.height * uniform(rng, 0.85, 1.15), low), high)
            x = other.foot[0] + uniform(rng, -0.35, 0.35) * height
            x = min(max(x, 0.04 * scene.size[1]), 0.96 * scene.size[1])
        figure, chance = scene.stand("person", person(rng), x, height), rng.random()
        if figure.seen == (True, True):  # some show in one camera only although both cameras see their surroundings
            infrared_only = 0.35 * domain.visible_only <= chance < 0.35 * (domain.visible_only + domain.infrared_only)
            figure.seen = (not infrared_only, chance >= 0.35 * domain.visible_only)
        people.append(figure)
    return people


def _occluders(rng: np.random.Generator, domain: Domain, scene: Scene, people: list[Figure]) -> list[Figure]:
    occluders = []
    for _ in range(count(rng, domain.occluders) if people else 0):
        behind = people[int(uniform(rng, 0, len(people)))]
        low = rng.random() < 0.5
        height = behind.height * (uniform(rng, 0.3, 0.6) if low else uniform(rng, 1.0, 1.4))
        x = behind.foot[0] + uniform(rng, -0.15, 0.15) * behind.height
        occluders.append(scene.stand("occluder", occluder(rng, low), x, height, at=1.02 * behind.height))
    return occluders


def _distractors(rng: np.random.Generator, domain: Domain, scene: Scene, others: list[Figure]) -> list[Figure]:
    """The first two are seen in visible light, the next two in infrared, so that neither image lacks them."""
    low, high = (share * scene.size[0] for share in domain.heights)
    distractors = []
    for number in range(count(rng, domain.distractors)):
        kind = DISTRACTORS[int(uniform(rng, 0, len(DISTRACTORS)))]
        height, chance = uniform(rng, 1.2 * low, 0.9 * high), rng.random()
        first = (number < 2 or chance < 0.25, number >= 2 or chance < 0.25)
        seen = first if number < 4 else (chance < 0.6, chance >= 0.4)
        x = _free_place(rng, scene, others + distractors, height)
        distractors.append(scene.stand(kind, distractor(rng, kind), x, height, seen=seen))
    return distractors


def _free_place(rng: np.random.Generator, scene: Scene, others: list[Figure], height: float) -> float:
    """Of a few columns the one where a figure covers the others least."""
    left, right = 0.04 * scene.size[1], 0.96 * scene.size[1]
    columns = (left + (right - left) * rng.random(6)).tolist()

    def covered(x: float) -> float:
        return sum(max(0.0, 0.25 * (other.height + height) - abs(other.foot[0] - x)) for other in others)

    return min(columns, key=covered)


def count(rng: np.random.Generator, limits: tuple[int, int]) -> int:
    """A whole number between both limits, each included."""
    return limits[0] + int(uniform(rng, 0, limits[1] - limits[0] + 1))
