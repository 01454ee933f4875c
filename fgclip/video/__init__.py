"""Video: records of data sets, decoding, features of clips, and the head that tells when something happens."""

from fgclip.video.decode import open_video
from fgclip.video.model import TemporalHead, VideoModel, load_video_model
from fgclip.video.synthetic import SyntheticVideos

__all__ = ["SyntheticVideos", "TemporalHead", "VideoModel", "load_video_model", "open_video"]
