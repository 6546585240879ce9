"""Commands beside train_gpt.py, each started from the repository's folder as `python -m
tools.NAME`.
"""
