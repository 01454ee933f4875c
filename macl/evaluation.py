"""A detector's outputs on a data set, with both cameras and with each alone, and their metrics."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

import trainkit.distributed as distributed
from macl.backbone import MODALITIES
from macl.boxes import own_boxes
from macl.data import collate
from macl.detector import Features, PairedFasterRCNN
from macl.metrics import alignment, average_precision, miss_rate_by_script, miss_rate_curve, miss_rate_table
from macl.metrics.average_precision import MAX_DETECTIONS, MEASURES
from macl.metrics.miss_rate import FRAME, TABLE, row_name
from trainkit.device import autocast, to_device
from trainkit.loader import make_loader
from trainkit.tables import aligned

SCORE_THRESHOLD = 0.001  # for metrics; a detector's own is for looking at
COLLAPSED = 0.5  # mean cosine of embeddings of different boxes
SEEN = {"both": (True, True), "visible_only": (True, False), "infrared_only": (False, True)}


@torch.inference_mode()
def predict(
    detector: PairedFasterRCNN, dataset: Dataset, *, modes: dict[str, tuple[str, ...]], device: torch.device | str,
    batch_size: int = 4, workers: int = 0, amp: str = "none", score_threshold: float = SCORE_THRESHOLD,
    between: Callable[[], None] | None = None,
) -> list[dict]:  # fmt: skip
    """Run a detector on every sample of a paired data set, each on exactly one process.

    modes: name -> modalities to detect with (see `PairedFasterRCNN.modes`), which share the features, but for those
        of a camera that the data set lacks; empty for embeddings alone
    between: called after every batch, see `distributed.in_step`

    Returns, on every process, one dict per image in the data set's order, on the CPU: image_id, size (H, W), classes
    (the names of labels 1, 2, ...), detections (by mode), ground_truth (the target, see `macl.data.collate`) and, with
    a contrastive head, embeddings (see `embed`).
    """
    was_training, modalities = detector.training, getattr(dataset, "modalities", MODALITIES)
    detector.eval()
    modes = {name: needed for name, needed in modes.items() if set(needed) <= set(modalities)}
    embeds = detector.macl is not None and len(modalities) == 2
    local = range(distributed.rank(), len(dataset), distributed.world_size())
    batches = [list(local[i : i + batch_size]) for i in range(0, len(local), batch_size)]
    loader = make_loader(dataset, batches, collate, workers=workers, device=device)
    results = []
    for batch in distributed.in_step(loader, len(batches), between):
        targets = batch["targets"]
        with autocast(amp, device):
            extracted = detector.extract({name: to_device(batch[name], device) for name in modalities})
            detections = detector.detect_modes(extracted, modes, score_threshold=score_threshold)
            embeddings = embed(detector, extracted, targets) if embeds else None
        for i, target in enumerate(targets):
            result = {
                "image_id": batch["image_id"][i],
                "size": tuple(batch["visible"][i].shape[-2:]),
                "classes": detector.kwargs["classes"],
                "detections": {mode: to_device(outputs[i], "cpu") for mode, outputs in detections.items()},
                "ground_truth": target,
            }
            results.append(result if embeddings is None else result | {"embeddings": embeddings[i]})
    detector.train(was_training)
    gathered = [result for part in distributed.gather_objects(results) for result in part]
    return sorted(gathered, key=lambda result: result["image_id"])


def embed(detector: PairedFasterRCNN, extracted: list[Features], targets: list[dict]) -> list[tuple[Tensor, ...]]:
    """Per image, on the CPU: visible and infrared embeddings (n, D), and which are seen in both modalities (n,) bool.

    Of its boxes that are not ignored, or one of the image. Where nobody knows what is seen, all are.
    """
    device = extracted[0].pyramids["visible"][0].device
    boxes = [own_boxes(target)[~target["ignore"]].to(device) for target in targets]
    visible, infrared = detector.embed(extracted, boxes)
    per_box, both = detector.macl_level != "image", []
    for target in targets:
        kept = ~target["ignore"]
        known = per_box and "visible_in" in target
        count = int(kept.sum()) if per_box else 1
        both.append(target["visible_in"][kept].all(1) if known else torch.ones(count, dtype=torch.bool))
    rows = [len(seen) for seen in both]
    return list(zip(visible.float().cpu().split(rows), infrared.float().cpu().split(rows), both, strict=True))


def detection_metrics(results: list[dict], max_detections: int = MAX_DETECTIONS) -> dict[str, dict]:
    """Mode -> ap50, ap75, ap, recall of `average_precision` (fractions; None without boxes).

    ap50_seen_in_both, ap50_seen_in_visible_only, ap50_seen_in_infrared_only: AP50 of these boxes alone, where known.
    per_class: the four by the name of each class, and their means above, where there are several classes.
    """
    frames = [result["ground_truth"] for result in results]
    seen_frames = {}
    if all("visible_in" in frame for frame in frames):
        for name, seen in SEEN.items():
            seen = torch.tensor(seen)
            seen_frames[name] = [
                frame | {"ignore": frame["ignore"] | (frame["visible_in"] != seen).any(1)} for frame in frames
            ]
    metrics, classes = {}, results[0]["classes"]
    for mode in results[0]["detections"]:
        outputs = [result["detections"][mode] for result in results]
        overall = average_precision(outputs, frames, max_detections=max_detections)
        metrics[mode] = {name: overall[name] for name in MEASURES}
        for name, seen in seen_frames.items():
            ap50 = average_precision(outputs, seen, max_detections=max_detections)["ap50"]
            metrics[mode][f"ap50_seen_in_{name}"] = ap50
        if len(classes) > 1:
            known = [overall["per_class"].get(label, {}) for label in range(1, 1 + len(classes))]
            per_class = [{key: values.get(key) for key in MEASURES} for values in known]
            metrics[mode]["per_class"] = dict(zip(classes, per_class, strict=True))
    return metrics


def miss_rate_tables(results: list[dict]) -> dict[str, dict[str, dict]]:
    """Mode -> the rows of `metrics.miss_rate_table` that the annotations can tell, see `people_frames`."""
    frames, rows = people_frames(results)
    return {mode: miss_rate_table(*both, rows) for mode, both in frames.items()}


def miss_rates_by_script(results: list[dict]) -> dict[str, dict[str, float | None]]:
    """Mode -> `metrics.miss_rate_by_script`; empty where occlusion or daytime is unknown."""
    frames, rows = people_frames(results)
    return {mode: miss_rate_by_script(*both) for mode, both in frames.items() if rows is TABLE}


def miss_rate_curves(results: list[dict]) -> dict[str, dict[str, dict]]:
    """Mode -> the first row of each daytime, such as "reasonable night" -> `metrics.miss_rate_curve` as lists.

    The curve is a staircase: only the points at which the miss rate changes stay, and the last.
    """
    frames, rows = people_frames(results)
    curves = {mode: {} for mode in frames}
    for mode, both in frames.items():
        for row in (row for row in rows if row[0] == rows[0][0]):
            curve = miss_rate_curve(*both, *row)
            kept = np.diff(curve["miss_rate"], prepend=100.0) != 0
            kept[-1:] = True
            points = {name: curve[name][kept].tolist() for name in ("fppi", "miss_rate")}
            curves[mode][row_name(*row)] = curve | points
    return curves


def people_frames(results: list[dict]) -> tuple[dict[str, tuple[list[dict], list[dict]]], list[tuple[str, str]]]:
    """Mode -> (detections, ground truth) of people, as `metrics.miss_rate_table` takes them; and its rows.

    Frames are stretched to KAIST's size, for which its heights and borders are meant. Other classes are ignored.
    Without person there is nothing; where occlusion or daytime is unknown, the subset all is the one row.
    """
    classes = list(results[0]["classes"])
    if "person" not in classes:
        return {}, []
    known = all({"occlusion", "daytime"} <= result["ground_truth"].keys() for result in results)
    person = 1 + classes.index("person")
    frames, detections = [], {mode: [] for mode in results[0]["detections"]}
    for result in results:
        height, width = result["size"]
        stretch = [FRAME[0] / width, FRAME[1] / height] * 2
        target = {"occlusion": torch.zeros_like(result["ground_truth"]["labels"])} | result["ground_truth"]
        boxes, ignore = target["boxes"], target["ignore"] | (target["labels"] != person)
        frames.append(target | {"boxes": boxes * boxes.new_tensor(stretch), "ignore": ignore})
        for mode, outputs in result["detections"].items():
            people = outputs["labels"] == person
            boxes = outputs["boxes"][people]
            detections[mode].append({"boxes": boxes * boxes.new_tensor(stretch), "scores": outputs["scores"][people]})
    return {mode: (outputs, frames) for mode, outputs in detections.items()}, TABLE if known else [("all", "all")]


def alignment_metrics(results: list[dict]) -> dict | None:
    """`metrics.alignment` of the boxes seen in both modalities; None without a contrastive head.

    r1_seen_in_one: r1 among the gallery_seen_in_one other boxes: what the registered context alone gives away.
    """
    if "embeddings" not in results[0]:
        return None
    visible, infrared, both = all_embeddings(results)
    single = alignment(visible[~both], infrared[~both])
    metrics = alignment(visible[both], infrared[both])
    return metrics | {"r1_seen_in_one": single["r1"], "gallery_seen_in_one": single["gallery"]}


def all_embeddings(results: list[dict]) -> tuple[Tensor, ...]:
    """The columns of `embed`, of all results."""
    return tuple(map(torch.cat, zip(*(result["embeddings"] for result in results), strict=True)))


def validation_text(metrics: dict, untrained: float | None = None) -> str:
    """`detection_metrics` and, under "alignment", `alignment_metrics` as a table in percent and two lines.

    untrained: R@1 before training, shown beside today's.
    """
    modes = {mode: values for mode, values in metrics.items() if mode != "alignment"}
    columns = [name for name in next(iter(modes.values())) if name != "per_class"]
    titles = [name.replace("ap50_seen_in_", "AP50 seen in ").replace("_", " ").replace("ap", "AP") for name in columns]
    rows = [["detecting with", *("AP50:95" if title == "AP" else title for title in titles)]]
    for mode, values in modes.items():
        classes = {f"  {name}": one for name, one in values.get("per_class", {}).items()}
        for name, one in ({mode: values} | classes).items():
            cells = [one.get(column) for column in columns]
            rows.append([name, *("-" if value is None else f"{100 * value:.1f}" for value in cells)])
    lines = ["", aligned(rows)]
    agreement = metrics["alignment"]
    if agreement is not None and agreement["r1"] is not None:
        recall = f"cross-modal retrieval R@1 {agreement['r1']:.3f}"
        recall += "" if untrained is None else f" (untrained {untrained:.3f})"
        recall += f" among {agreement['gallery']} boxes seen in both"
        if agreement["r1_seen_in_one"] is not None:
            recall += f"; of {agreement['gallery_seen_in_one']} seen in one only {agreement['r1_seen_in_one']:.3f}"
        names = ("alignment", "uniformity", "modality_gap", "distance_ratio")
        known = [f"{name.replace('_', ' ')} {agreement[name]:.3f}" for name in names if agreement[name] is not None]
        lines += [recall, ", ".join(known)]
        if agreement["cosine_unmatched"] > COLLAPSED:
            cosine = f"mean cosine {agreement['cosine_unmatched']:.2f}"
            lines.append(f"Warning: embeddings of different boxes are nearly alike ({cosine}): collapsed, or untrained")
    return "\n".join(lines)
