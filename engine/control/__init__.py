"""What Headrace keeps in MongoDB besides the documents: jobs, their ranges and leases, sources, rejects, workers."""
