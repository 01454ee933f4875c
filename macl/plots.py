"""Pictures: detections side by side, embeddings under t-SNE, miss-rate curves.

draw_detections needs Pillow alone; the other two need matplotlib and scikit-learn, the ``viz`` extra.
"""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from trainkit.errors import InputError
from trainkit.files import whole_file

COLOURS = {"detection": (255, 158, 44), "ground truth": (70, 200, 255), "ignored": (165, 165, 165)}
BACKGROUND, TEXT, DIVIDER_COLOUR = (24, 26, 30), (232, 232, 232), (110, 112, 118)
MIN_SIDE = 384  # smaller images are enlarged by a whole factor until their shorter side reaches it, ...
MAX_SIDE = 4096  # ... or their longer side this
DIVIDER = 4  # pixels between the two images


def draw_detections(visible, infrared, detections, ground_truth=None, *, min_score=0.3, classes=None) -> Image.Image:
    """Both modalities of one frame side by side, with the same boxes on each, as an RGB picture with a legend below.

    * ``visible``, ``infrared``: (3, H, W) or (1, H, W) tensors in 0..1, or PIL images, of equal size; either may be
      None, not both.
    * ``detections``: dict of boxes (N, 4) x1, y1, x2, y2 in pixels of the image, scores (N,), labels (N,). Those below
      ``min_score`` are left out. With ``classes``, the names of labels 1, 2, ..., each carries its name and score.
    * ``ground_truth``: dict of boxes (M, 4) and, where known, ignore (M,) bool: those are grey and dashed.
    """
    images = {
        name: _picture(image) for name, image in (("visible", visible), ("infrared", infrared)) if image is not None
    }
    if not images:
        raise ValueError("draw_detections needs a visible or an infrared image")
    sizes = {image.size for image in images.values()}
    if len(sizes) > 1:
        raise ValueError(f"the two images differ in size: {' and '.join(f'{w}x{h}' for w, h in sorted(sizes))}")
    (width, height), *_ = sizes
    factor = max(1, min(math.ceil(MIN_SIDE / min(width, height)), MAX_SIDE // max(width, height)))
    side = min(width, height) * factor
    line, font = max(2, round(side / 300)), ImageFont.load_default(size=6 + side // 50)
    boxes = _truth_boxes(ground_truth, factor) + _detection_boxes(detections, factor, min_score, classes)

    panel = (width * factor, height * factor)
    bar = round(font.size * 2)
    picture = Image.new("RGB", (len(images) * (panel[0] + DIVIDER) - DIVIDER, panel[1] + bar), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 0, picture.width, panel[1] - 1), fill=DIVIDER_COLOUR)
    for index, (name, image) in enumerate(images.items()):
        image = _annotated(image.resize(panel, Image.Resampling.BICUBIC), name, boxes, line, font)
        picture.paste(image, (index * (panel[0] + DIVIDER), 0))
    _legend(draw, panel[1], bar, {kind for _, kind, _ in boxes}, min_score, font)
    return picture


def tsne_picture(path, visible_embeddings, infrared_embeddings, *, title="", seed=0, max_pairs=200) -> bool:
    """Write a t-SNE layout (van der Maaten and Hinton, JMLR 2008) of both modalities' embeddings (N, D) to ``path``.

    Rows are L2-normalised; row i of both shows the same object, and a line joins the two. More than ``max_pairs`` are
    thinned evenly. Returns whether a picture was written: fewer than two pairs cannot be laid out. The same ``seed``
    gives the same layout. Raises InputError when matplotlib or scikit-learn is missing.
    """
    try:
        from matplotlib.collections import LineCollection
        from matplotlib.figure import Figure
        from sklearn.manifold import TSNE
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise InputError(_missing("a t-SNE picture", error)) from error

    count = len(visible_embeddings)
    if count < 2:
        return False
    chosen = np.unique(np.linspace(0, count - 1, min(count, max_pairs)).round().astype(int))
    rows = torch.cat(
        [torch.as_tensor(part).detach().cpu().double()[chosen] for part in (visible_embeddings, infrared_embeddings)]
    )
    rows = torch.nn.functional.normalize(rows, dim=1).numpy()  # (2 P, D)
    spread = rows.std(0)
    tsne = TSNE(
        perplexity=min(30, (len(rows) - 1) / 3),
        init="pca" if (spread > 1e-6).sum() >= 2 else "random",  # PCA of a collapsed embedding divides by zero
        random_state=seed,
    )
    with threadpool_limits(1):  # its threads wait for each other: ten times slower on cores that others use too
        layout = tsne.fit_transform(rows)  # (2 P, 2)
    visible, infrared = layout[: len(chosen)], layout[len(chosen) :]  # (P, 2) each

    figure = Figure(figsize=(7, 7), layout="constrained")
    axes = figure.add_subplot()
    axes.add_collection(LineCollection(np.stack([visible, infrared], 1), colors="#888888", linewidths=0.6, alpha=0.5))
    for name, points, colour, marker in (("visible", visible, "#2a78b8", "o"), ("infrared", infrared, "#d9552b", "s")):
        axes.scatter(*points.T, s=22, c=colour, marker=marker, edgecolors="white", linewidths=0.4, label=name, zorder=2)
    axes.set(title=title or f"t-SNE of {len(chosen)} pairs", xticks=[], yticks=[])
    axes.legend(loc="best", framealpha=0.9)
    _save(figure, path)
    return True


def miss_rate_plot(path, curves: dict[str, dict], *, title="") -> None:
    """Write miss rate over false positives per image, both logarithmic, to ``path``.

    ``curves``: by name, what macl.metrics.miss_rate_curve returns (or its lists, read back from json); the legend is
    sorted by log-average miss rate. Raises InputError when matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(_missing("a plot of the miss rate", error)) from error

    figure = Figure(figsize=(7, 5.5), layout="constrained")
    axes = figure.add_subplot()
    axes.axvspan(1e-2, 1, color="#000000", alpha=0.04, lw=0)  # where the miss rate is averaged
    measured = {name: curve for name, curve in curves.items() if curve["log_average_miss_rate"] is not None}
    for name, curve in sorted(measured.items(), key=lambda item: item[1]["log_average_miss_rate"]):
        # A log axis has no 0 and no end; before the first detection all is missed.
        fppi = np.concatenate([[1e-6], np.maximum(1e-6, curve["fppi"]), [1e6]])
        miss_rate = np.concatenate([[100], np.maximum(1e-3, curve["miss_rate"])])
        label = f"{curve['log_average_miss_rate']:.2f} %  {name}"
        axes.step(fppi, [*miss_rate, miss_rate[-1]], where="post", lw=1.8, label=label)
    ticks = [1, 2, 5, 10, 20, 30, 50, 80, 100]
    axes.set(xscale="log", yscale="log", xlim=(1e-3, 1e1), ylim=(1, 110), title=title)
    axes.set(xlabel="false positives per image", ylabel="miss rate (%)")
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.grid(True, color="#000000", alpha=0.12, lw=0.6)
    if measured:
        axes.legend(loc="lower left", title="log-average miss rate", alignment="left", framealpha=0.9)
    _save(figure, path)


def _save(figure, path) -> None:
    with whole_file(path) as file:
        figure.savefig(file, dpi=120, format=Path(path).suffix[1:] or None)


def _missing(what: str, error: ImportError) -> str:
    return f"{what} needs {error.name or error}, which the viz extra brings: pip install -e '.[viz]'"


def _picture(image) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    image = torch.as_tensor(image).detach().float().cpu().clamp(0, 1)
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"an image is {tuple(image.shape)}, expected (3, H, W) or (1, H, W)")
    pixels = (image * 255).round().byte().expand(3, -1, -1).permute(1, 2, 0)  # (H, W, 3)
    return Image.fromarray(pixels.contiguous().numpy())


def _truth_boxes(ground_truth, factor) -> list[tuple]:
    """(corners, kind, text) of every box."""
    if ground_truth is None:
        return []
    boxes = _scaled(ground_truth["boxes"], factor)
    ignore = torch.as_tensor(ground_truth.get("ignore", [False] * len(boxes))).tolist()
    return [(box, "ignored" if ignored else "ground truth", "") for box, ignored in zip(boxes, ignore, strict=True)]


def _detection_boxes(detections, factor, min_score, classes) -> list[tuple]:
    """(corners, kind, text) of every box, the best ones last and so on top of the others."""
    scores = torch.as_tensor(detections["scores"]).tolist()
    labels = torch.as_tensor(detections["labels"]).tolist()
    found = []
    for score, label, box in sorted(zip(scores, labels, _scaled(detections["boxes"], factor), strict=True)):
        if score >= min_score:
            found.append((box, "detection", f"{classes[int(label) - 1]} {score:.2f}" if classes else f"{score:.2f}"))
    return found


def _scaled(boxes, factor) -> list[list[float]]:
    return (torch.as_tensor(boxes).detach().cpu().double().reshape(-1, 4) * factor).tolist()


def _annotated(image, name, boxes, line, font) -> Image.Image:
    draw = ImageDraw.Draw(image)
    for corners, kind, _ in boxes:
        if kind == "ignored":
            _dashed_rectangle(draw, corners, COLOURS[kind], line)
        else:
            x1, y1, x2, y2 = corners
            wider = line // 2 if kind == "ground truth" else 0  # it shows beneath a detection at the same place
            draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=COLOURS[kind], width=line + wider)
    for corners, kind, text in boxes:  # after all boxes, so that no line runs through a label
        if text:
            _label(draw, corners, text, COLOURS[kind], font)
    _tag(draw, (line, line), name, BACKGROUND, TEXT, font)
    return image


def _dashed_rectangle(draw, corners, colour, width) -> None:
    x1, y1, x2, y2 = corners
    dash = 4 * width
    for start in np.arange(x1, x2, 2 * dash):
        for y in (y1, y2):
            draw.line((start, y, min(start + dash, x2), y), fill=colour, width=width)
    for start in np.arange(y1, y2, 2 * dash):
        for x in (x1, x2):
            draw.line((x, start, x, min(start + dash, y2)), fill=colour, width=width)


def _label(draw, corners, text, colour, font) -> None:
    """Above the box, or inside it where the picture ends."""
    x1, y1, _, _ = corners
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    x = max(0, min(x1, draw.im.size[0] - (right - left) - 5))
    y = y1 - (bottom - top) - 4
    _tag(draw, (x, y if y >= 0 else max(0, y1)), text, colour, BACKGROUND, font)


def _tag(draw, corner, text, background, colour, font) -> None:
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    x, y = corner
    draw.rectangle((x, y, x + right - left + 4, y + bottom - top + 4), fill=background)
    draw.text((x + 2 - left, y + 2 - top), text, fill=colour, font=font)


def _legend(draw, top, height, shown, min_score, font) -> None:
    x, middle, side = height // 4, top + height // 2, font.size * 0.7
    for kind, colour in COLOURS.items():
        if kind in shown:
            text = f"{kind}, {min_score:g} or more" if kind == "detection" else kind
            draw.rectangle((x, middle - side / 2, x + side, middle + side / 2), outline=colour, width=2)
            draw.text((x + 1.6 * side, middle), text, fill=TEXT, font=font, anchor="lm")
            x += 1.6 * side + draw.textlength(text, font=font) + 2 * side
