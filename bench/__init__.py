"""Measurements on NVIDIA GPUs, started as `python -m bench.NAME`."""
