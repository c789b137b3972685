"""Loading: planning a job, and working on a lease from its first byte to its close."""
