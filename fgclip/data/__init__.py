"""Annotations to batches."""

from fgclip.data.benchmarks import DCI, ClassFolders, COCOBoxes, Flickr30k, ShareGPT4V, by_image
from fgclip.data.collate import Collate, Texts
from fgclip.data.dataset import RegionDataset, Sample, data_statistics, draw_sample, hold_out, usable_regions
from fgclip.data.records import COCO, FGOVD, FineHARD, JsonItems, Record, Region
