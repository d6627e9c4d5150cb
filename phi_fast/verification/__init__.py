"""The parts of `phi_fast.verify`: what is computed, how it is judged, and the published checkpoint's logits."""
