"""Paired data sets: one sample type for training, validation and inference (see macl.data.sample)."""

from macl.data.held_out import hold_out
from macl.data.joint import JointDataset
from macl.data.kaist import KAIST
from macl.data.kaist_labels import read_ground_truth
from macl.data.llvip import LLVIP
from macl.data.loader import collate
from macl.data.occurrence import refuse_absent_classes
from macl.data.sample import find_pairs, read_image, read_pair
from macl.data.scenes import DAY_AND_NIGHT, NIGHT, Domain
from macl.data.synthetic import SyntheticPairs
from macl.data.transforms import AugmentedDataset, MisalignedDataset, PairedAugmentation, Plain, to_float
