"""What `python -m phi_fast.plan` is made of: devices, kernels' work, memory, communication, and the plan itself."""
