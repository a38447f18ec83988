"""Data sets of image shards: their format, which sample comes when, and reading them."""
