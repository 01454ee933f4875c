"""Pictures: detections side by side, embeddings under t-SNE, miss-rate curves.

t-SNE and curves need the ``viz`` extra: matplotlib and scikit-learn.
"""

import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize
from torchvision.transforms.v2.functional import to_pil_image

from macl.evaluation import all_embeddings
from trainkit.drawing import Mark, draw_marks, heat
from trainkit.files import whole_file

FOUND_BY = {(True, True): "by each camera", (True, False): "by visible alone", (False, True): "by infrared alone",
            (False, False): "by both together only"}  # fmt: skip
COLOURS = {"detection": (255, 158, 44), "ground truth": (70, 200, 255), "ignored": (165, 165, 165)}
COLOURS |= zip(FOUND_BY.values(), ((255, 158, 44), (70, 200, 255), (240, 110, 170), (165, 165, 165)), strict=True)
MAX_PICTURES = 6  # of a validation
MAX_PAIRS = 200  # of a t-SNE picture


def draw_detections(
    visible, infrared, detections, ground_truth=None, *, classes, min_score=0.3, evidence=None, factors=None
) -> Image.Image:
    """Both modalities of one frame side by side, with the same boxes on each and a legend below.

    visible, infrared: (3, H, W) uint8 tensors of one size; either may be None
    detections: boxes (N, 4) x1, y1, x2, y2 in pixels of the image, labels (N,), scores (N,)
    ground_truth: boxes (M, 4), labels (M,), ignore (M,) bool
    classes: the names of labels 1, 2, ..., shown on detections, and on the truth where there are several
    min_score: detections below it are left out
    evidence, factors: see `macl.explain`; the colour says which camera alone finds a box with min_score, and beside the
        images stand those under their factors
    """
    images = {"visible": visible, "infrared": infrared}
    images = {name: to_pil_image(image) for name, image in images.items() if image is not None}
    for name, values in (factors or {}).items():
        title = f"{name}: MSP's factor, {values.min():.3f} to {values.max():.3f}"
        images[title] = heat(images[name], values.cpu().numpy())
    marks = []
    if ground_truth is not None:
        rows = zip(*(ground_truth[key].tolist() for key in ("boxes", "labels", "ignore")), strict=True)
        for box, label, ignored in rows:
            name = classes[label - 1] if len(classes) > 1 else ""
            marks.append(Mark(box, "ignored" if ignored else "ground truth", name, below=True))
    columns = [detections[key].tolist() for key in ("scores", "labels", "boxes")]
    alone = {name[0]: scores.tolist() for name, scores in (evidence or {}).items()}
    outputs = zip(*columns, zip(*alone.values(), strict=True) if alone else [()] * len(columns[0]), strict=True)
    for score, label, box, each in sorted(outputs):  # the best ones last, on top of the others
        if score >= min_score:
            words = [f"{classes[label - 1]} {score:.2f}", *(f"{a} {b:.2f}" for a, b in zip(alone, each, strict=True))]
            kind = FOUND_BY[tuple(one >= min_score for one in each)] if each else "detection"
            marks.append(Mark(box, kind, " ".join(words)))
    return draw_marks(images, marks, COLOURS, {"detection": f"detection, {min_score:g} or more"})


def draw_validation(folder: Path, epoch: int, dataset, results: list[dict]) -> None:
    """Pictures of a few results of `evaluation.predict` and, with the viz extra, of the embeddings under t-SNE."""
    folder = folder / "pictures"
    folder.mkdir(exist_ok=True)
    for index in range(0, len(results), math.ceil(len(results) / MAX_PICTURES)):
        sample, result = dataset[index], results[index]
        detections = next(iter(result["detections"].values()))
        truth, classes = result["ground_truth"], result["classes"]
        present = zip(("visible", "infrared"), sample.get("present", (True, True)), strict=True)
        images = [sample[name] if there else None for name, there in present]
        picture = draw_detections(*images, detections, truth, classes=classes)
        with whole_file(folder / f"validation-{index}.png") as file:
            picture.save(file, "PNG")
    if "embeddings" in results[0] and find_spec("matplotlib") and find_spec("sklearn"):
        visible, infrared, both = all_embeddings(results)
        title = f"validation boxes seen in both modalities, after epoch {epoch}"
        tsne_picture(folder / f"tsne-{epoch:03d}.png", visible[both], infrared[both], title=title)


def tsne_picture(path: Path, visible: torch.Tensor, infrared: torch.Tensor, *, title: str) -> None:
    """Write a t-SNE layout (van der Maaten and Hinton, JMLR 2008) of both modalities' embeddings (N, D).

    A line joins row i of both, which show the same object. Rows are L2-normalised; more than MAX_PAIRS are thinned
    evenly. Nothing is written for fewer than two.
    """
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    count = len(visible)
    if count < 2:
        return
    chosen = np.unique(np.linspace(0, count - 1, min(count, MAX_PAIRS)).round().astype(int))
    rows = normalize(torch.cat([visible[chosen], infrared[chosen]]).double(), dim=1).numpy()  # (2 P, D)
    start = "pca" if (rows.std(0) > 1e-6).sum() >= 2 else "random"  # PCA of a collapsed embedding divides by zero
    tsne = TSNE(perplexity=min(30, (len(rows) - 1) / 3), init=start, random_state=0)
    with threadpool_limits(1):  # its threads wait for each other: ten times slower on cores that others use too
        points = tsne.fit_transform(rows).reshape(2, len(chosen), 2)  # (modality, P, 2)

    figure = Figure(figsize=(7, 7), layout="constrained")
    axes = figure.add_subplot()
    axes.add_collection(LineCollection(points.swapaxes(0, 1), colors="#888888", linewidths=0.6, alpha=0.5))
    axes.scatter(*points[0].T, s=22, c="#2a78b8", marker="o", edgecolors="white", linewidths=0.4, label="visible")
    axes.scatter(*points[1].T, s=22, c="#d9552b", marker="s", edgecolors="white", linewidths=0.4, label="infrared")
    axes.set(title=title, xticks=[], yticks=[])
    axes.legend(loc="best", framealpha=0.9)
    with whole_file(path) as file:
        figure.savefig(file, dpi=120)


def miss_rate_plot(path: Path, curves: dict[str, dict], *, title: str = "") -> None:
    """Write miss rate over false positives per image, both logarithmic, sorted by log-average miss rate.

    curves: name -> curve as from `macl.metrics.miss_rate_curve`, of arrays or lists
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5.5), layout="constrained")
    axes = figure.add_subplot()
    axes.axvspan(1e-2, 1, color="#000000", alpha=0.04, lw=0)  # where the miss rate is averaged
    measured = [(name, curve) for name, curve in curves.items() if curve["log_average_miss_rate"] is not None]
    for name, curve in sorted(measured, key=lambda item: item[1]["log_average_miss_rate"]):
        # A log axis has no 0 and no end; before the first detection all is missed.
        fppi = [1e-6, *np.maximum(1e-6, curve["fppi"]), 1e6]
        miss_rate = [100, *np.maximum(1e-3, curve["miss_rate"])]
        label = f"{curve['log_average_miss_rate']:.2f} %  {name}"
        axes.step(fppi, [*miss_rate, miss_rate[-1]], where="post", lw=1.8, label=label)
    ticks = [1, 2, 5, 10, 20, 30, 50, 80, 100]
    axes.set(xscale="log", yscale="log", xlim=(1e-3, 1e1), ylim=(1, 110), title=title)
    axes.set(xlabel="false positives per image", ylabel="miss rate (%)")
    axes.set_yticks(ticks, ticks)
    axes.set_yticks([], minor=True)
    axes.grid(True, color="#000000", alpha=0.12, lw=0.6)
    if measured:
        axes.legend(loc="lower left", title="log-average miss rate", alignment="left", framealpha=0.9)
    with whole_file(path) as file:
        figure.savefig(file, dpi=120, format=Path(path).suffix[1:])
