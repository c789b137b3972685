"""One load: how a job is planned, and one lease from its first byte to its close."""
