"""Objects in S3: looking them up, reading and writing them."""
