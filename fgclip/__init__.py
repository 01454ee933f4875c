"""FG-CLIP: image, long text and regions."""

from fgclip.loading import load_model
from fgclip.model import FGCLIP
from fgclip.tokenizer import Tokenizer
from fgclip.weights import load_clip_weights, save_clip_weights

__all__ = ["FGCLIP", "Tokenizer", "load_clip_weights", "load_model", "save_clip_weights"]
