"""The parts of `phi_fast.evaluate`: the adapter to lm-eval, the tasks, the sandbox, and the figures."""
