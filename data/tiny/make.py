"""Makes what lies beside it anew: a tiny artifact, its tokenizer, validation shard and log.

    python data/tiny/make.py        # from the repository's folder; a few minutes on two CPU cores

The text is that of `data/prepare.py sample`: documentation that comes with Python, so that another
Python gives another text, another tokenizer and another model. Validation is cut to its first
documents, which makes scoring, and an audit that scores many times, short. The training shard lies
here only while the model is trained.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BOS_ID = 1
HEADER_BYTES = 1024  # of a shard: 256 int32, of which the third is the number of tokens
VALIDATION_TOKENS = 8192  # at least so many: whole documents

# Steps end it, well within the clock, so that the same machine trains the same model again.
SETTINGS = {
    "PRESET": "tiny",
    "RUN_ID": "tiny",
    "LOG_DIR": "data/tiny",
    "DATA_PATH": "data/tiny",
    "TOKENIZER_PATH": "data/tiny/tokenizer.model",
    "DEVICE": "cpu",
    "ITERATIONS": "200",
    "MAX_WALLCLOCK_SECONDS": "600",
    "SAMPLE_PROMPT": "The function returns",
    "SAMPLE_TOKENS": "60",
}


def cut_shard(source: Path, out: Path) -> None:
    """Writes the first whole documents of a shard, VALIDATION_TOKENS tokens or a little more."""
    data = source.read_bytes()
    header = np.frombuffer(data[:HEADER_BYTES], dtype="<i4").copy()
    tokens = np.frombuffer(data[HEADER_BYTES:], dtype="<u2")
    borders = np.flatnonzero(tokens == BOS_ID)
    end = borders[borders >= VALIDATION_TOKENS][0]
    header[2] = end
    out.write_bytes(header.tobytes() + tokens[:end].tobytes())


def main() -> None:
    """Sample text, a cut, a run."""
    settings = os.environ | SETTINGS
    with tempfile.TemporaryDirectory() as folder:
        prepare = [sys.executable, "data/prepare.py", "sample", "--out", folder]
        subprocess.run(prepare, cwd=ROOT, check=True)
        sample = Path(folder)
        cut_shard(sample / "sample_val_000000.bin", HERE / "tiny_val_000000.bin")
        shutil.copyfile(sample / "sample_1024_bpe.model", HERE / "tokenizer.model")
        training = HERE / "tiny_train_000000.bin"
        shutil.copyfile(sample / "sample_train_000000.bin", training)
    for old in HERE.glob("tiny.*"):
        old.unlink()
    try:
        run = [sys.executable, "train_gpt.py"]
        subprocess.run(run, cwd=ROOT, env=settings, check=True)
    finally:
        training.unlink()
    (HERE / "tiny.txt").unlink()  # holds the whole script


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a console may lack a sign
    main()
