"""Objects in S3: what they are, reading and writing them."""
