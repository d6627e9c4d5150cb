"""The parts of `phi_fast.convert`: layouts, sources of tensors, the output folder, and the files beside the weights."""
