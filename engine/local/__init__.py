"""The embedded servers, and a sample to load."""
