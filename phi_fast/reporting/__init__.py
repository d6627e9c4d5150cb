"""The parts of `python -m phi_fast.report`: reading run directories, curves, the page, the picture."""
