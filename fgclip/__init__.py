"""FG-CLIP: image, long text and regions."""

import kernels

if not hasattr(kernels, "roi_align_project"):
    raise ImportError(
        f"{kernels.__file__} is another package named kernels; put the project's folder first on the path"
    )

from fgclip.loading import load_model  # noqa: E402
from fgclip.model import FGCLIP  # noqa: E402
from fgclip.tokenizer import Tokenizer  # noqa: E402
from fgclip.weights import load_clip_weights, save_clip_weights  # noqa: E402
from trainkit.load_report import LoadReport  # noqa: E402

__all__ = ["FGCLIP", "LoadReport", "Tokenizer", "load_clip_weights", "load_model", "save_clip_weights"]
