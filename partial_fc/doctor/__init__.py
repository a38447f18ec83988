"""What would go wrong in a run, found before it: partial-fc doctor."""
