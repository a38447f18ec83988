"""Evaluation: verification (1:1) and identification (1:N) of a backbone, by all ranks together."""
