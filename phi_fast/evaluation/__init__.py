"""The parts of `phi_fast.evaluate`: lm-eval's adapter, tasks, the sandbox, and the figures."""
