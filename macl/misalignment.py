"""How a detector stands cameras that are not registered: its figures while one modality is moved aside."""

from macl.data import MisalignedDataset
from macl.detector import PairedFasterRCNN
from macl.validation import detection_metrics, miss_rate_metrics, predict
from trainkit.tables import aligned

OTHER = {"visible": "infrared", "infrared": "visible"}


def misalignment_figures(
    detector: PairedFasterRCNN, dataset, results: list, *, modality: str, pixels: list[int], most: int = 100, **run
) -> list[dict]:
    """One dict a step: name, pixels (None for the other modality alone), ap50 and, where it is known, miss_rate.

    results: what `predict` found, with both at least, in the data set as it is; run: its keywords; most: how many
    detections AP looks at. Boxes stay where the modality that is not moved shows them, so that one alone, which comes
    last where the results have it, is what a fusion has to beat.
    """
    lines = [{"name": "0 pixels", "pixels": 0, **headline(results, "both", most)}]
    for step in pixels:
        shifted = MisalignedDataset(dataset, modality=modality, pixels=step)
        found = predict(detector, shifted, modes={"both": detector.modes["both"]}, **run)
        lines.append({"name": f"{step} pixels", "pixels": step, **headline(found, "both", most)})
    if OTHER[modality] in results[0]["found"]:
        alone = OTHER[modality]
        lines.append({"name": f"{alone} alone", "pixels": None, **headline(results, alone, most)})
    return lines


def headline(results: list[dict], mode: str, most: int) -> dict:
    """AP50 as a fraction and, where it is known, the miss rate of reasonable in percent; of one mode."""
    one = [result | {"found": {mode: result["found"][mode]}} for result in results]
    figures = {"ap50": detection_metrics(one, most)[mode]["ap50"]}
    miss_rates = miss_rate_metrics(one)
    return figures | {"miss_rate": miss_rates[mode]["reasonable all"]} if miss_rates else figures


def misalignment_text(lines: list[dict], modality: str) -> str:
    """The figures as aligned text, in percent."""
    titles = {"ap50": "AP50", "miss_rate": "log-average miss rate"}
    columns = [key for key in titles if key in lines[0]]
    rows = [[f"{modality} moved right by", *(titles[key] for key in columns)]]
    for line in lines:
        values = [(line[key], 100 if key == "ap50" else 1) for key in columns]
        cells = ["-" if value is None else f"{scale * value:.2f}" for value, scale in values]
        rows.append([line["name"], *cells])
    return aligned(rows)
