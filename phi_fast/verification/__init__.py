"""The parts of `phi_fast.verify`: the cases, their comparison with float64, and the published checkpoint's logits."""
