"""Filters between raw text and `prepare`: each step reads documents with scores, writes those it keeps, and counts."""
