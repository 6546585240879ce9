"""Commands beside train_gpt.py, each started from the repository's folder as `python -m
tools.NAME`.
"""

import os

# Before any of them loads torch, and for the reason that train_gpt.py has when it is started.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
