"""What a detector finds in a data set, with both cameras and with each alone, as figures, text and pictures.

`predict` gives the results, one dict an image; the other functions make something of them.
"""

import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

import trainkit.distributed as distributed
from macl.data import Plain, collate, to_float
from macl.detector import Features, PairedFasterRCNN
from macl.metrics import alignment, average_precision, ignore_all_but, miss_rate_curve, miss_rate_table, seen_in
from macl.metrics.average_precision import MAX_DETECTIONS, MEASURES
from macl.metrics.miss_rate import DAYTIMES, FRAME
from macl.plots import draw_detections, tsne_picture
from trainkit.device import autocast
from trainkit.files import whole_file
from trainkit.loader import make_loader
from trainkit.tables import aligned

SCORE_THRESHOLD = 0.001  # for figures; below a detector's own, which is for looking at
PEOPLE = ("person",)
SEEN = {"both": (True, True), "visible_only": (True, False), "infrared_only": (False, True)}


@torch.inference_mode()
def predict(
    detector: PairedFasterRCNN,
    dataset: Dataset,
    *,
    modes: dict[str, tuple[str, ...]],
    device: torch.device | str,
    batch_size: int = 4,
    workers: int = 0,
    amp: str = "none",
    score_threshold: float = SCORE_THRESHOLD,
    between: Callable[[], None] | None = None,
) -> list[dict]:
    """What the detector finds in every image of a data set of paired samples, each image on exactly one process.

    modes: name -> modalities to detect with (see `PairedFasterRCNN.modes`); none to embed only. Features are computed
    once for all. between: see `distributed.in_step`. -> on every process, one dict an image, in order: image_id, path,
    size (H, W), classes (the names of labels 1, 2, ...), `found` (mode -> detections, on the CPU), `truth` (the boxes
    with labels, ignore and what else is known), and, of a detector with a contrastive head, `embeddings`: (visible,
    infrared), each (n, out_dim), of the boxes that are not ignored or of the image.
    """
    was_training = detector.training
    detector.eval()
    own = [[index] for index in range(distributed.rank(), len(dataset), distributed.world_size())]
    batches = [sum(own[i : i + batch_size], []) for i in range(0, len(own), batch_size)]
    results = []
    loader = make_loader(Plain(dataset), batches, collate, workers=workers, device=device)
    for batch in distributed.in_step(loader, len(batches), between):
        images = {name: [image.to(device) for image in batch[name]] for name in ("visible", "infrared")}
        with autocast(amp, device):
            extracted = detector.extract(images)
            found = {
                mode: [to_cpu(one) for one in detector.detect(extracted, names, score_threshold=score_threshold)]
                for mode, names in modes.items()
            }
            embeddings = embed(detector, extracted, batch["targets"]) if detector.macl is not None else None
        for i, truth in enumerate(batch["targets"]):
            if batch["daytime"][i] is not None:
                truth = truth | {"daytime": batch["daytime"][i]}
            result = {
                "image_id": batch["image_id"][i],
                "path": batch["path"][i],
                "size": tuple(batch["visible"][i].shape[-2:]),
                "classes": detector.kwargs.get("classes", PEOPLE),
                "found": {mode: detections[i] for mode, detections in found.items()},
                "truth": truth,
            }
            if embeddings is not None:
                result["embeddings"] = embeddings[i]
            results.append(result)
    detector.train(was_training)
    everyone = [result for part in distributed.gather_objects(results) for result in part]
    return sorted(everyone, key=lambda result: result["image_id"])


def to_cpu(detections: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in detections.items()}


def embed(detector: PairedFasterRCNN, extracted: list[Features], targets: list[dict]) -> list[tuple[Tensor, Tensor]]:
    """The (visible, infrared) embeddings of each image's boxes that are not ignored, or of the image; on the CPU."""
    boxes = [target["boxes"][~target["ignore"]].to(extracted[0].pyramids["visible"][0].device) for target in targets]
    rows = [len(box) if detector.macl_level == "roi" else 1 for box in boxes]
    visible, infrared = (part.float().cpu().split(rows) for part in detector.embed(extracted, boxes))
    return list(zip(visible, infrared, strict=True))


def classes_of(results: list[dict]) -> Sequence[str]:
    """What the labels of some results stand for."""
    return results[0].get("classes", PEOPLE) if results else PEOPLE


def detection_metrics(results: list[dict], max_detections: int = MAX_DETECTIONS) -> dict[str, dict]:
    """Mode -> ap50, ap75, ap, recall (fractions; None without boxes), and where the data set knows in which modality
    each box can be seen, ap50 of those alone: ap50_seen_in_both, ..._visible_only, ..._infrared_only. Of several
    classes the four are means, and per_class has those of each by name.

    max_detections: the best of an image and class that are looked at.
    """
    truth, classes = [result["truth"] for result in results], classes_of(results)
    kinds = {}
    if truth and all("visible_in" in frame for frame in truth):
        for name, (visible, infrared) in SEEN.items():
            kinds[name] = ignore_all_but(truth, seen_in(truth, visible=visible, infrared=infrared))
    figures = {}
    for mode in results[0]["found"] if results else ():
        found = [result["found"][mode] for result in results]
        overall = average_precision(found, truth, max_detections=max_detections)
        figures[mode] = {name: overall[name] for name in MEASURES}
        for name, frames in kinds.items():
            seen = average_precision(found, frames, max_detections=max_detections)
            figures[mode][f"ap50_seen_in_{name}"] = seen["ap50"]
        if len(classes) > 1:
            own = [overall["per_class"].get(label, {}) for label in range(1, 1 + len(classes))]
            figures[mode]["per_class"] = {
                name: {key: values.get(key) for key in MEASURES} for name, values in zip(classes, own, strict=True)
            }
    return figures


def miss_rate_metrics(results: list[dict]) -> dict[str, dict[str, float | None]]:
    """Mode -> row -> log-average miss rate in percent (lower is better), the ten rows of `metrics.miss_rate_table`:
    "reasonable all", "reasonable day", ..., "all"; None where a row has no person.

    Empty unless the data set knows occlusion and daytime, as KAIST and the drawn scenes do.
    """
    tables = miss_rate_tables(results)
    return {mode: {row: values["miss_rate"] for row, values in rows.items()} for mode, rows in tables.items()}


def miss_rate_tables(results: list[dict]) -> dict[str, dict[str, dict]]:
    """The same with all of `metrics.miss_rate_table`: mode -> row -> miss_rate, recall, boxes, frames."""
    return {mode: miss_rate_table(*frames) for mode, frames in miss_rate_frames(results).items()}


def miss_rate_curves(results: list[dict]) -> dict[str, dict[str, dict]]:
    """Mode -> "reasonable all", "reasonable day", "reasonable night" -> `metrics.miss_rate_curve`, as lists, of which
    only the points stay at which the miss rate changes, and the last: the curve is a staircase."""
    curves = {}
    for mode, (detections, truth) in miss_rate_frames(results).items():
        curves[mode] = {}
        for daytime in DAYTIMES:
            curve = miss_rate_curve(detections, truth, "reasonable", daytime)
            fppi, miss_rate = curve["fppi"].tolist(), curve["miss_rate"].tolist()
            before = [100.0, *miss_rate]
            kept = [i for i in range(len(fppi)) if miss_rate[i] != before[i] or i == len(fppi) - 1]
            points = {"fppi": [fppi[i] for i in kept], "miss_rate": [miss_rate[i] for i in kept]}
            curves[mode][f"reasonable {daytime}"] = curve | points
    return curves


def miss_rate_frames(results: list[dict]) -> dict[str, tuple[list[dict], list[dict]]]:
    """Mode -> (detections, ground truth) as the functions of `metrics.miss_rate` take them.

    Heights and borders of their rows are for frames of KAIST's size, so others are stretched to it. What is not a
    person is ignored.
    """
    truth, classes = [result["truth"] for result in results], list(classes_of(results))
    if not all("occlusion" in frame and "daytime" in frame for frame in truth) or "person" not in classes:
        return {}
    person = 1 + classes.index("person")
    frames = [
        frame | {"boxes": to_kaist(frame["boxes"], result), "ignore": frame["ignore"] | (frame["labels"] != person)}
        for frame, result in zip(truth, results, strict=True)
    ]
    found = {}
    for mode in results[0]["found"] if results else ():
        people = [(result, result["found"][mode], result["found"][mode]["labels"] == person) for result in results]
        found[mode] = [
            {"boxes": to_kaist(one["boxes"][first], result), "scores": one["scores"][first]}
            for result, one, first in people
        ]
    return {mode: (detections, frames) for mode, detections in found.items()}


def to_kaist(boxes: Tensor, result: dict) -> Tensor:
    """(N, 4) boxes of an image of result["size"], stretched to a frame of KAIST."""
    height, width = result["size"]
    return boxes if (width, height) == FRAME else boxes * boxes.new_tensor([FRAME[0] / width, FRAME[1] / height] * 2)


def alignment_metrics(results: list[dict]) -> dict | None:
    """`metrics.alignment` of the boxes seen in both modalities, and r1, its mean R@1 of both directions.

    To be held against it, r1_seen_in_one: of the boxes seen in only one modality, in a gallery of their own, which
    tells what the registered context alone gives away. None without a contrastive head.
    """
    if not results or "embeddings" not in results[0]:
        return None
    visible, infrared = (torch.cat([result["embeddings"][i] for result in results]) for i in (0, 1))
    both = torch.cat([seen_in_both(result) for result in results])
    figures = alignment(visible[both], infrared[both])
    figures["r1"] = mean_recall(figures)
    figures["r1_seen_in_one"] = mean_recall(alignment(visible[~both], infrared[~both]))
    figures["gallery_seen_in_one"] = int((~both).sum())
    return figures


def seen_in_both(result: dict) -> Tensor:
    """(n,) bool, one a row of the result's embeddings; all True where the data set does not know."""
    rows = len(result["embeddings"][0])
    truth = result["truth"]
    known = "visible_in" in truth and rows == int((~truth["ignore"]).sum())
    return truth["visible_in"][~truth["ignore"]].all(dim=1) if known else torch.ones(rows, dtype=torch.bool)


def mean_recall(figures: dict) -> float | None:
    """Retrieval R@1, the mean of both directions; None where there is nothing to retrieve."""
    both = [figures["r1_visible_to_infrared"], figures["r1_infrared_to_visible"]]
    return None if None in both else sum(both) / 2


def table(figures: dict[str, dict], max_detections: int | None = None) -> str:
    """The modes' figures as aligned text, in percent, one mode a row, below it its classes where it has several.

    max_detections: what `detection_metrics` was given, for a last line that tells it.
    """
    columns = [name for name in next(iter(figures.values())) if name != "per_class"]
    titles = [name.replace("ap50_seen_in_", "AP50 seen in ").replace("_", " ").replace("ap", "AP") for name in columns]

    def row(name: str, values: dict) -> list[str]:
        cells = [values.get(column) for column in columns]
        return [name, *("-" if value is None else f"{100 * value:.1f}" for value in cells)]

    rows = [["detecting with", *("AP50:95" if title == "AP" else title for title in titles)]]
    for mode, values in figures.items():
        rows.append(row(mode, values))
        rows += [row(f"  {name}", own) for name, own in values.get("per_class", {}).items()]
    limit = f"\n(AP, recall: of the best {max_detections} detections of an image and class)" if max_detections else ""
    return aligned(rows) + limit


def miss_rate_text(tables: dict[str, dict[str, dict]]) -> str:
    """The tables of `miss_rate_tables` as aligned text, one of the ten rows a line, with the final recall beside."""
    titles = [title for mode in tables for title in (mode, "recall")]
    lines = [["log-average miss rate, %", *titles, "people", "frames"]]
    for row, values in next(iter(tables.values())).items():
        figures = [rows[row][key] for rows in tables.values() for key in ("miss_rate", "recall")]
        cells = ["-" if value is None else f"{value:.2f}" for value in figures]
        lines.append([row, *cells, str(values["boxes"]), str(values["frames"])])
    return aligned(lines)


def validation_text(figures: dict, untrained: float | None) -> str:
    """The figures of `detection_metrics` and, under "alignment", of `alignment_metrics`, for people."""
    lines = ["", table({mode: values for mode, values in figures.items() if mode != "alignment"})]
    agreement = figures["alignment"]
    if agreement is not None and agreement["r1"] is not None:
        recall = f"cross-modal retrieval R@1 {agreement['r1']:.3f}"
        recall += "" if untrained is None else f" (untrained {untrained:.3f})"
        recall += f" among {agreement['gallery']} boxes seen in both"
        if agreement["r1_seen_in_one"] is not None:
            recall += f"; of {agreement['gallery_seen_in_one']} seen in one only {agreement['r1_seen_in_one']:.3f}"
        names = ("alignment", "uniformity", "modality_gap", "distance_ratio")
        known = [(name.replace("_", " "), agreement[name]) for name in names if agreement[name] is not None]
        lines += [recall, ", ".join(f"{name} {value:.3f}" for name, value in known)]
    return "\n".join(lines)


def draw_validation(folder: Path, epoch: int, data, results: list[dict], classes: list[str], count: int = 6) -> None:
    """A few validation pairs with what was found, and, with the viz extra, the embeddings under t-SNE."""
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    for index in range(0, len(results), max(1, math.ceil(len(results) / count))):
        sample, result = data[index], results[index]
        found = next(iter(result["found"].values()))
        images = {name: to_float(sample[name]) for name in ("visible", "infrared")}
        picture = draw_detections(**images, detections=found, ground_truth=result["truth"], classes=classes)
        with whole_file(pictures / f"validation-{index}.png") as file:
            picture.save(file, "PNG")
    if "embeddings" in results[0] and find_spec("matplotlib") and find_spec("sklearn"):
        both = torch.cat([seen_in_both(result) for result in results])
        visible, infrared = (torch.cat([result["embeddings"][i] for result in results])[both] for i in (0, 1))
        title = f"validation boxes seen in both modalities, after epoch {epoch}"
        tsne_picture(pictures / f"tsne-{epoch:03d}.png", visible, infrared, title=title)
