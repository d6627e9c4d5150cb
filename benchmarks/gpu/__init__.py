"""A GPU's first day: `make gpu` proves and measures this project on the machine's GPU within a budget of seconds."""
