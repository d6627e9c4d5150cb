"""Campaigns of damage, far longer than a test: `make attack`. Each is a module with `attack(tally, seed)`."""
