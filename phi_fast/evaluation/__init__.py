"""The parts of `phi_fast.evaluate`: lm-eval's adapter, tasks, the sandbox, the report's tables and the figures."""
