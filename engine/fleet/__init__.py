"""The processes: the worker, how it chooses its next work, and its supervisor."""
