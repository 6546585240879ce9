"""Proves what can be proved about a submission: see tools/audit/__main__.py."""
