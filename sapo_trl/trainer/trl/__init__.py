"""Everything that touches TRL's private names: the other folders use its public names alone."""
