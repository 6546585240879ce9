"""Idea: the fused scan of another version of train_gpt.py, to time the present one beside it.

    git show COMMIT:train_gpt.py > /tmp/former.py
    IDEA_SCRIPT=/tmp/former.py python -m bench.tune --idea tools/ideas/scan_of_another_version.py

bench.bench and bench.steps take it in the same way.
"""

import importlib.util
import os
import sys
from pathlib import Path


def install(script) -> None:
    """Puts that version's triton_scan() in the place of train_gpt.py's."""
    path = Path(os.environ.get("IDEA_SCRIPT") or "train_gpt.py")
    script.need(path.is_file(), f"IDEA_SCRIPT={path}: no such file")
    same = path.read_bytes() == Path(script.__file__).read_bytes()
    script.need(not same, f"IDEA_SCRIPT={path} is the present version: name another one's file")
    spec = importlib.util.spec_from_file_location("another_version", path)
    another = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = another  # by which name the compiler imports it
    spec.loader.exec_module(another)
    script.need(hasattr(another, "triton_scan"), f"IDEA_SCRIPT={path} has no triton_scan()")
    script.triton_scan = another.triton_scan
