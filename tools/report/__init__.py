"""Runs' logs as one page of HTML for a reviewer: see tools/report/__main__.py."""
