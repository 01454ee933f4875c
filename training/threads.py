"""Import this before torch: threads that wait for each other sleep instead of spinning.

On cores that loading processes or other people use too, OpenMP threads that spin while they wait keep the very thread
they wait for from running. A training step on two busy cores took ten times as long for it. OpenMP reads its
environment once, when torch loads it; a value that is already set is left alone.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
