"""What no setting says: files for `python -m tools.explore --idea`."""
