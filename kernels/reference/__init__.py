"""The ops in plain PyTorch: what every other back end is measured against."""
