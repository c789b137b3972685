"""Splitting, parsing, writing, queueing, supervising."""

import os

# Bytes are looked at with numpy, and no matrix is multiplied: its library must not start threads in a process that forks.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
