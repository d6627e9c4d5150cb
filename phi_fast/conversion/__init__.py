"""The parts of `phi_fast.convert`: layouts, where tensors come from, where they go, and what goes beside them."""
