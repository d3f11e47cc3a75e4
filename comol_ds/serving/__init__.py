"""Trained adapters in use: inference in Python, and launch/export.py's work from the adapter to the report."""
