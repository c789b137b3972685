"""Lines of bytes, without I/O: where to cut them, what they become, and how they are put together."""
