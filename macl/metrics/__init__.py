"""Average precision, log-average miss rate, agreement of the modalities' embeddings, detection files."""

from macl.metrics.alignment import alignment
from macl.metrics.average_precision import average_precision, matches
from macl.metrics.detection_files import could_count_from_zero, read_detections, write_detections
from macl.metrics.miss_rate import log_average_miss_rate, miss_rate_by_script, miss_rate_curve, miss_rate_table
