"""Synthetic textbooks: prompts, the requests to a server that completes them, and what is kept of its texts."""
