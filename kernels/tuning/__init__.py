"""The parts of `phi_fast.kernels.tune`: what is launched, what the compiler says of it, and how it is timed."""
