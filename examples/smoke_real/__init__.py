"""`make smoke-real`: SAPO on a real language model and real questions, all of it out of packages."""
