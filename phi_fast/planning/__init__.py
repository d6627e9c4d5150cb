"""The parts of `python -m phi_fast.plan`: devices, the kernels' work, memory, communication, and the plan itself."""
