"""Paired data sets: one sample type for training, validation and inference (see macl.data.sample)."""

from macl.data.annotation import refuse_absent_classes
from macl.data.folders import LLVIP, Pairs, open_root
from macl.data.kaist import KAIST, is_kaist, read_ground_truth
from macl.data.names import find_pairs
from macl.data.onto import Onto, read_onto
from macl.data.pairs import JointDataset, PairedDataset, hold_out
from macl.data.sample import collate, moved, put_together, read_image, read_pair, to_float
from macl.data.scenes import DAY_AND_NIGHT, DAY_AND_NIGHT_REGISTERED, NIGHT, Domain
from macl.data.synthetic import SyntheticPairs
from macl.data.transforms import AugmentedDataset, PairedAugmentation
