"""The ops in C++ for CPUs (csrc/cpu), behind the same names."""
