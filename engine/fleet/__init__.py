"""The processes: what a worker does next, the worker, and its supervisor."""
