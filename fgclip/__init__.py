"""FG-CLIP: image, long text and regions."""

import kernels

if not hasattr(kernels, "roi_align_project"):
    raise ImportError(
        f"another package named kernels was found first ({kernels.__file__}); "
        "run from the project's folder, or put that first on the path"
    )

from fgclip.loading import load_model  # noqa: E402
from fgclip.model import FGCLIP  # noqa: E402
from fgclip.tokenizer import Tokenizer  # noqa: E402
from fgclip.weights import load_clip_weights, save_clip_weights  # noqa: E402

__all__ = ["FGCLIP", "Tokenizer", "load_clip_weights", "load_model", "save_clip_weights"]
