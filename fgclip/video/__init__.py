"""Video: records of data sets, decoding, features of clips, and the head that tells when something happens."""

from fgclip.video.model import TemporalHead, VideoModel, load_video_model

__all__ = ["TemporalHead", "VideoModel", "load_video_model"]
