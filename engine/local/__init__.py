"""The embedded servers, and a sample file to load."""
