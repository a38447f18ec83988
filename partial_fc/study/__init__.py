"""A study: many training runs that differ in a few settings, each tuned alike, in a ledger that resumes."""
