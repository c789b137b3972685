"""Lines of text, without I/O: cutting bytes into lines, lines into batches, and decoding lines into documents."""
