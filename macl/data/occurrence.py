"""What occurs in a data set: counts, and classes that nobody has, which can neither be learnt nor measured."""

from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from trainkit.errors import InputError
from trainkit.files import shown


def label_of_people(classes: Sequence[str], source: str) -> int:
    """The label of person, wherever it stands among the classes. Raises InputError where it does not."""
    if "person" not in classes:
        raise InputError(f"{source} hold people, named person; the classes are {', '.join(map(shown, classes))}")
    return 1 + list(classes).index("person")


def refuse_absent_classes(dataset, *, every: bool) -> None:
    """`refuse_absent` of a data set's `classes`, `source` and `objects(index)`."""
    refuse_absent(dataset.classes, map(dataset.objects, range(len(dataset))), dataset.source, every=every)


def refuse_absent(
    classes: Sequence[str], objects: Iterable[tuple[list[str], set[int]]], source: str, *, every: bool
) -> None:
    """Raises InputError, with the names that occur, where no object that is not ignored has one of the classes.

    objects: of each image the names of all objects, and the labels that one of them has that is not ignored; asked for
    until all has been seen. every: each of the classes has to occur, as in training; otherwise one will do.
    """
    names, seen = Counter(), set()
    for found, labels in objects:
        names.update(found)
        seen |= labels
        if len(seen) == len(classes) or (seen and not every):
            return
    absent = " or ".join(shown(name) for label, name in enumerate(classes, 1) if label not in seen)
    known = ", ".join(f"{shown(name)} {count}" for name, count in names.most_common(12)) or "none at all"
    raise InputError(
        f"no object that counts has the class {absent}: is it spelt as in the data, given once, not always ignored? "
        f"Names found: {known}. Read: {source}"
    )


def summary(scenes: Sequence[int], everyone: list) -> dict:
    """Counts over the annotations of all pairs: `boxes`, `ignore`, `clipped` and `dropped` of each are asked."""
    boxes = torch.cat([one.boxes for one in everyone])
    heights = (boxes[:, 3] - boxes[:, 1]).sort().values.tolist()
    return {
        "pairs": len(everyone),
        "scenes": len(set(scenes)),
        "boxes": len(boxes),
        "ignored": sum(int(one.ignore.sum()) for one in everyone),
        "clipped": sum(one.clipped for one in everyone),
        "dropped": sum(one.dropped for one in everyone),
        "empty_images": sum(len(one.boxes) == 0 for one in everyone),
        "min_height": heights[0] if heights else None,
        "median_height": heights[len(heights) // 2] if heights else None,
        "max_height": heights[-1] if heights else None,
    }
