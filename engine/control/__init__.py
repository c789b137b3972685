"""What is kept in MongoDB beside the documents: jobs, their ranges and leases, sources, rejects, workers."""
