"""FG-CLIP: image, long text and regions."""

from fgclip.model import FGCLIP
from fgclip.tokenizer import Tokenizer
from fgclip.weights import LoadReport, load_clip_weights, save_clip_weights

__all__ = ["FGCLIP", "LoadReport", "Tokenizer", "load_clip_weights", "save_clip_weights"]
