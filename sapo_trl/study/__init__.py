"""Studies that compare algorithms, on tasks that can tell them apart."""
