"""Validation pairs out of a training set: whole scenes, since neighbouring pairs of a scene look alike."""

from collections import defaultdict

from trainkit.errors import InputError


def hold_out(dataset, *, fraction: float = 0.1):
    """Splits off the last scenes, one of each group a round, until they hold at least `fraction` of the pairs.

    dataset: an LLVIP, whose scenes are the cameras, all of one group; or a KAIST, whose scenes are the videos, in a
    group for each set, so that every place is held out, by day and by night. The first scene of a group always stays.
    Where no scene can be spared every k-th pair is held out, k = 1 / fraction.

    -> the rest for training, the pairs held out, and a sentence that says what was held out. Raises InputError when
    there are fewer than two pairs.
    """
    total = len(dataset)
    if total < 2:
        raise InputError(f"{dataset.source}: {total} pair; at least 2 are needed to hold one out")
    chosen = _last_scenes(dataset, fraction * total)
    if chosen:
        held_out = [index for index, scene in enumerate(dataset.scenes) if scene in chosen]
        kind = dataset.scene_kind if len(chosen) == 1 else f"{dataset.scene_kind}s"
        sentence = (
            f"Held out for validation: {len(held_out)} of the {total} pairs of {dataset.split}, "
            f"all those of {kind} {', '.join(map(dataset.scene_name, sorted(chosen)))}"
        )
    else:
        step = min(round(1 / fraction), total)
        held_out = range(step - 1, total, step)
        sentence = (
            f"Warning: {dataset.split} has no {dataset.scene_kind} to spare, so one in {step} of its {total} pairs is "
            f"held out for validation ({len(held_out)} pairs), and validation pairs look like their neighbours in "
            "training"
        )
    kept = sorted(set(range(total)) - set(held_out))
    return (
        dataset.subset(kept, f"{dataset.source}, {len(kept)} of them kept for training"),
        dataset.subset(held_out, f"{dataset.source}, {len(held_out)} of them held out for validation"),
        sentence,
    )


def _last_scenes(dataset, enough: float) -> set[int]:
    groups = defaultdict(list)
    for scene in sorted(set(dataset.scenes)):
        groups[dataset.scene_group(scene)].append(scene)
    chosen: set[int] = set()
    for round_ in range(1, max(map(len, groups.values()))):
        chosen |= {scenes[-round_] for scenes in groups.values() if len(scenes) > round_}
        if sum(scene in chosen for scene in dataset.scenes) >= enough:
            break
    return chosen
