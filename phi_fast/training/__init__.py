"""The trainer: options, the loop, the ZeRO-2 step, run directories and checkpoints, signals, metrics."""
