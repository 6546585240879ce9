"""Ideas that are not settings: files for `python -m tools.explore --idea`."""
