"""The paired visible + infrared detector: Faster R-CNN with modal-aware contrastive learning."""

import kernels

if not hasattr(kernels, "roi_align_project"):
    raise ImportError(
        f"{kernels.__file__} is another package named kernels; put the project's folder first on the path"
    )

from macl.build import build_detector, load_detector  # noqa: E402
from macl.detector import PairedFasterRCNN  # noqa: E402
from macl.weights import load_torchvision_weights  # noqa: E402
from trainkit.errors import InputError  # noqa: E402
from trainkit.load_report import LoadReport  # noqa: E402

__all__ = [
    "InputError",
    "LoadReport",
    "PairedFasterRCNN",
    "build_detector",
    "load_detector",
    "load_torchvision_weights",
]
