"""`make smoke-real`: SAPO on a real language model and real questions, both from packages."""
