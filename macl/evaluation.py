"""A detector's outputs on a data set, with both cameras and with each alone, and the metrics of these outputs."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

import trainkit.distributed as distributed
from macl.data import AsFloat, collate
from macl.detector import Features, PairedFasterRCNN
from macl.metrics import alignment, average_precision, miss_rate_curve, miss_rate_table
from macl.metrics.average_precision import MAX_DETECTIONS, MEASURES
from macl.metrics.miss_rate import DAYTIMES, FRAME
from trainkit.device import autocast, to_device
from trainkit.loader import make_loader
from trainkit.tables import aligned

SCORE_THRESHOLD = 0.001  # for metrics; below a detector's own, which is for looking at
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
    """Run a detector on every sample of a paired data set, each on exactly one process.

    modes: name -> modalities to detect with (see `PairedFasterRCNN.modes`); empty for embeddings alone. Features are
        computed once for all modes.
    between: called after every batch, see `distributed.in_step`.

    Returns, on every process, one dict per image in the data set's order, on the CPU: image_id, size (H, W), classes
    (the names of labels 1, 2, ...), detections (by mode), ground_truth (boxes, labels, ignore, and visible_in,
    occlusion, daytime where known) and, with a contrastive head, embeddings: (visible, infrared), each (n, out_dim), of
    the boxes that are not ignored or of the image.
    """
    was_training = detector.training
    detector.eval()
    local = range(distributed.rank(), len(dataset), distributed.world_size())
    batches = [list(local[i : i + batch_size]) for i in range(0, len(local), batch_size)]
    loader = make_loader(AsFloat(dataset), batches, collate, workers=workers, device=device)
    results = []
    for batch in distributed.in_step(loader, len(batches), between):
        targets = batch["targets"]
        with autocast(amp, device):
            extracted = detector.extract({name: to_device(batch[name], device) for name in ("visible", "infrared")})
            detections = {
                mode: detector.detect(extracted, names, score_threshold=score_threshold)
                for mode, names in modes.items()
            }
            embeddings = embed(detector, extracted, targets) if detector.macl is not None else None
        for i, target in enumerate(targets):
            daytime = batch["daytime"][i]
            result = {
                "image_id": batch["image_id"][i],
                "size": tuple(batch["visible"][i].shape[-2:]),
                "classes": detector.kwargs["classes"],
                "detections": {
                    mode: {name: value.cpu() for name, value in outputs[i].items()}
                    for mode, outputs in detections.items()
                },
                "ground_truth": target if daytime is None else target | {"daytime": daytime},
            }
            results.append(result if embeddings is None else result | {"embeddings": embeddings[i]})
    detector.train(was_training)
    gathered = [result for part in distributed.gather_objects(results) for result in part]
    return sorted(gathered, key=lambda result: result["image_id"])


def embed(detector: PairedFasterRCNN, extracted: list[Features], targets: list[dict]) -> list[tuple[Tensor, Tensor]]:
    """The (visible, infrared) embeddings of each image's boxes that are not ignored, or of the image; on the CPU."""
    boxes = [target["boxes"][~target["ignore"]].to(extracted[0].pyramids["visible"][0].device) for target in targets]
    rows = [len(box) if detector.macl_level == "roi" else 1 for box in boxes]
    visible, infrared = (part.float().cpu().split(rows) for part in detector.embed(extracted, boxes))
    return list(zip(visible, infrared, strict=True))


def detection_metrics(results: list[dict], max_detections: int = MAX_DETECTIONS) -> dict[str, dict]:
    """Mode -> ap50, ap75, ap, recall of `average_precision` (fractions; None without boxes).

    Where the data set knows in which modality each box can be seen, also ap50 of those alone: ap50_seen_in_both,
    ap50_seen_in_visible_only, ap50_seen_in_infrared_only. With several classes the four are means, and per_class has
    those of each class by name.
    """
    frames = [result["ground_truth"] for result in results]
    seen_frames = {}
    if all("visible_in" in frame for frame in frames):
        for name, seen in SEEN.items():
            seen = torch.tensor(seen)
            seen_frames[name] = [
                frame | {"ignore": frame["ignore"] | (frame["visible_in"] != seen).any(1)} for frame in frames
            ]
    metrics = {}
    for mode in results[0]["detections"] if results else ():
        outputs = [result["detections"][mode] for result in results]
        overall = average_precision(outputs, frames, max_detections=max_detections)
        metrics[mode] = {name: overall[name] for name in MEASURES}
        for name, seen in seen_frames.items():
            ap50 = average_precision(outputs, seen, max_detections=max_detections)["ap50"]
            metrics[mode][f"ap50_seen_in_{name}"] = ap50
        classes = results[0]["classes"]
        if len(classes) > 1:
            per_class = [overall["per_class"].get(label, {}) for label in range(1, 1 + len(classes))]
            metrics[mode]["per_class"] = {
                name: {key: values.get(key) for key in MEASURES}
                for name, values in zip(classes, per_class, strict=True)
            }
    return metrics


def miss_rate_metrics(results: list[dict]) -> dict[str, dict[str, float | None]]:
    """Mode -> row -> log-average miss rate in percent (lower is better): `miss_rate_tables` without the rest."""
    tables = miss_rate_tables(results)
    return {mode: {row: values["miss_rate"] for row, values in rows.items()} for mode, rows in tables.items()}


def miss_rate_tables(results: list[dict]) -> dict[str, dict[str, dict]]:
    """Mode -> the ten rows of `metrics.miss_rate_table`, "reasonable all", "reasonable day", ..., "all".

    Empty unless the data set knows occlusion and daytime, as KAIST and the drawn scenes do.
    """
    return {mode: miss_rate_table(*frames) for mode, frames in people_frames(results).items()}


def miss_rate_curves(results: list[dict]) -> dict[str, dict[str, dict]]:
    """Mode -> "reasonable all", "reasonable day", "reasonable night" -> `metrics.miss_rate_curve` as lists.

    Of the points only those stay at which the miss rate changes, and the last: the curve is a staircase.
    """
    curves = {}
    for mode, frames in people_frames(results).items():
        curves[mode] = {}
        for daytime in DAYTIMES:
            curve = miss_rate_curve(*frames, "reasonable", daytime)
            kept = np.diff(curve["miss_rate"], prepend=100.0) != 0
            kept[-1:] = True
            points = {name: curve[name][kept].tolist() for name in ("fppi", "miss_rate")}
            curves[mode][f"reasonable {daytime}"] = curve | points
    return curves


def people_frames(results: list[dict]) -> dict[str, tuple[list[dict], list[dict]]]:
    """Mode -> (detections, ground truth) of people alone, as `metrics.miss_rate_table` takes them.

    Its heights and borders are for frames of KAIST's size, so others are stretched to it. Other classes are ignored.
    """
    known = all({"occlusion", "daytime"} <= result["ground_truth"].keys() for result in results)
    if not results or not known or "person" not in results[0]["classes"]:
        return {}
    person = 1 + list(results[0]["classes"]).index("person")
    frames, detections = [], {mode: [] for mode in results[0]["detections"]}
    for result in results:
        height, width = result["size"]
        stretch = [FRAME[0] / width, FRAME[1] / height] * 2
        target = result["ground_truth"]
        boxes, ignore = target["boxes"], target["ignore"] | (target["labels"] != person)
        frames.append(target | {"boxes": boxes * boxes.new_tensor(stretch), "ignore": ignore})
        for mode, outputs in result["detections"].items():
            people = outputs["labels"] == person
            boxes = outputs["boxes"][people]
            detections[mode].append({"boxes": boxes * boxes.new_tensor(stretch), "scores": outputs["scores"][people]})
    return {mode: (outputs, frames) for mode, outputs in detections.items()}


def alignment_metrics(results: list[dict]) -> dict | None:
    """`metrics.alignment` of the boxes seen in both modalities; None without a contrastive head.

    r1_seen_in_one: r1 of the boxes seen in only one modality, in a gallery of their own: what the registered context
    alone gives away.
    """
    if not results or "embeddings" not in results[0]:
        return None
    visible, infrared, both = all_embeddings(results)
    single = alignment(visible[~both], infrared[~both])
    metrics = alignment(visible[both], infrared[both])
    return metrics | {"r1_seen_in_one": single["r1"], "gallery_seen_in_one": single["gallery"]}


def all_embeddings(results: list[dict]) -> tuple[Tensor, Tensor, Tensor]:
    """The visible and infrared embeddings (N, D) of all results, and whether a box is seen in both modalities (N,)."""
    visible, infrared = (torch.cat([result["embeddings"][i] for result in results]) for i in (0, 1))
    both = []
    for result in results:
        rows, target = len(result["embeddings"][0]), result["ground_truth"]
        # One row per image, or a data set that does not know: all.
        known = "visible_in" in target and rows == int((~target["ignore"]).sum())
        both.append(target["visible_in"][~target["ignore"]].all(1) if known else torch.ones(rows, dtype=torch.bool))
    return visible, infrared, torch.cat(both)


def validation_text(metrics: dict, untrained: float | None = None) -> str:
    """The `detection_metrics` as a table in percent and, under "alignment", the `alignment_metrics`, for people.

    untrained: R@1 before training, to be shown beside today's.
    """
    modes = {mode: values for mode, values in metrics.items() if mode != "alignment"}
    columns = [name for name in next(iter(modes.values())) if name != "per_class"]
    titles = [name.replace("ap50_seen_in_", "AP50 seen in ").replace("_", " ").replace("ap", "AP") for name in columns]
    rows = [["detecting with", *("AP50:95" if title == "AP" else title for title in titles)]]
    for mode, values in modes.items():
        classes = [(f"  {name}", one) for name, one in values.get("per_class", {}).items()]
        for name, one in [(mode, values), *classes]:
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
    return "\n".join(lines)
