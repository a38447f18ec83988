"""Turning anything into a data set folder of shards and an index."""
