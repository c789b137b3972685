"""The engine: splitting, parsing, writing, queueing, supervising."""

import os

# numpy only scans bytes here: its BLAS library, which is never used, must not start threads in a process that forks.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
