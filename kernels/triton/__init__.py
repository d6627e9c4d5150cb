"""The ops in Triton. Imported only when a Triton kernel is asked for: this package needs triton installed."""
