"""Annotations to batches: readers of the public formats, samples, collation and statistics."""

from fgclip.data.benchmarks import DCI, ClassFolders, COCOBoxes, Flickr30k, ShareGPT4V, by_image
from fgclip.data.collate import Collate, Texts
from fgclip.data.dataset import RegionDataset, Sample, draw_sample, evenly, hold_out, image_ids, usable_regions
from fgclip.data.records import COCO, FGOVD, FineHARD, JsonItems, Record, Region
from fgclip.data.statistics import DataStatistics, data_statistics
