"""What `python -m phi_fast.report` is made of: reading run directories, curves, the page, the picture."""
