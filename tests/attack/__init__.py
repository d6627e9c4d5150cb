"""Attack campaigns, much longer than a test: `make attack`. Each is a module with `attack(tally, seed)`."""
