"""Trains small models by two versions of train_gpt.py and says whether every bit is the same.

    python tests/bit_equal.py                # the working tree's script beside the last commit's
    python tests/bit_equal.py COMMIT         # beside that commit's
    python tests/bit_equal.py COMMIT --cases tiny,short

Compared are the losses of every step, the scores before and behind quantization, and the SHA-256
of the artifact's payload (what follows its header's line). Runs are short, on the CPU and on
sample text, so that all cases end within three minutes on two cores. What a rewriting must not
change, this holds; a change that is meant to change numbers says so in its commit.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
HEADER_BYTES = 1024  # of a shard
VALIDATION_TOKENS = 6_000  # enough for two chunks of test-time training

COMMON = {
    "DEVICE": "cpu",
    "VOCAB_SIZE": "1024",
    "MAX_WALLCLOCK_SECONDS": "0",
    "SDCLIP_K": "5",
    "TRAIN_LOG_EVERY": "1",
    "CHECKPOINT_EVERY": "0",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
}
TWO_LAYERS = {
    "ITERATIONS": "3",
    "NUM_LAYERS": "2",
    "MAMBA_LAYERS": "0",
    "MLP_LAYERS": "1",
    "MODEL_DIM": "64",
    "NUM_HEADS": "2",
    "NUM_KV_HEADS": "1",
    "TRAIN_SEQ_LEN": "128",
    "TRAIN_BATCH_TOKENS": "512",
    "CALIBRATION_TOKENS": "512",
    "TTT_CHUNK_TOKENS": "2048",
    "EVAL_STRIDE": "64",
    "VAL_BATCH_SIZE": "2048",
    "MAMBA_HEAD_DIM": "32",
    "WARMUP_STEPS": "1",
}
# For quantizers that follow no errors; scripts that do not know these never did.
PLAIN_GRIDS = {"TRELLIS_STATES": "0", "SDCLIP_BY_MATRIX": "0", "SDCLIP_BY_ROW": "0"}
CASES = {  # settings beyond COMMON, and the number of ranks
    "tiny": ({"PRESET": "tiny", "ITERATIONS": "6"}, 1),
    "tiny-two-ranks": ({"PRESET": "tiny", "ITERATIONS": "6"}, 2),
    "default": (TWO_LAYERS, 1),
    "short": (TWO_LAYERS | {"PRESET": "short"}, 1),
    "peer7": (TWO_LAYERS | {"PRESET": "peer7"}, 1),
    "nemotron_hinge": (
        TWO_LAYERS | {"PRESET": "nemotron_hinge", "LAYER_ORDER": "0,1,0,1", "QUANTIZER": "dsq"},
        1,
    ),
    "hybrid11": (TWO_LAYERS | {"PRESET": "hybrid11", "QUANTIZER": "percentile"}, 1),
    "hybrid18": (TWO_LAYERS | {"PRESET": "hybrid18", "LATE_QAT_THRESHOLD": "0.9"}, 1),
    "mamba2": (TWO_LAYERS | PLAIN_GRIDS | {"MAMBA_VERSION": "2", "QUANTIZER": "round"}, 1),
    "ternary": (  # SCOPE: commits that do not know it reset scans alone
        TWO_LAYERS
        | PLAIN_GRIDS
        | {"QUANTIZER": "ternary", "SPELLING_FEATURES": "0"}
        | {"DOCUMENT_RESET": "1", "DOCUMENT_SCOPE": "scans"},
        1,
    ),
}


def make_data(folder: Path) -> Path:
    """The sample's shards and tokenizer, with a shorter validation text."""
    command = [sys.executable, str(ROOT / "data" / "prepare.py"), "sample", "--out", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    shard = folder / "sample_val_000000.bin"
    tokens = np.fromfile(shard, dtype="<u2", offset=HEADER_BYTES)[: VALIDATION_TOKENS + 1]
    header = np.fromfile(shard, dtype="<i4", count=HEADER_BYTES // 4)
    header[2] = len(tokens)
    shard.write_bytes(header.tobytes() + tokens.tobytes())
    return folder


def run_case(script: Path, name: str, data: Path) -> dict:
    """What one case comes to by one script: every number of its records, and the payload's sum."""
    settings, ranks = CASES[name]
    logs = script.parent / "logs"
    paths = {
        "DATA_PATH": str(data),
        "TOKENIZER_PATH": str(data / "sample_1024_bpe.model"),
        "LOG_DIR": str(logs),
        "RUN_ID": name,
    }
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    done = subprocess.run(
        [*launcher, str(script)],
        env=environment | COMMON | paths | settings,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{name} by {script}: status {done.returncode}\n{done.stdout}{done.stderr}")
    records = map(json.loads, (logs / f"{name}.jsonl").read_text().splitlines())
    found = {}
    for record in records:
        for key in ("train_loss", "val_loss", "val_bpb", "sdclip_k"):
            if key in record:
                found[f"{len(found)} {record['event']} {key}"] = record[key]
    artifact = (logs / f"{name}.int6.lzma").read_bytes()
    payload = artifact[artifact.index(b"\n") + 1 : -32]  # the last 32 bytes are a sum of the file
    found["payload"] = hashlib.sha256(payload).hexdigest()
    return found


def compare(name: str, scripts: list[Path], data: Path) -> bool:
    """Runs a case by both scripts and prints how they differ."""
    before, after = (run_case(script, name, data) for script in scripts)
    different = [key for key in before if before[key] != after.get(key)]
    verdict = "equal" if not different else f"DIFFERS in {different[0]}, {len(different)} in all"
    print(
        f"{name}: {verdict} ({len(before)} numbers, payload {before['payload'][:12]})", flush=True
    )
    for key in different[:3]:
        print(f"  {key}: {before[key]} before, {after.get(key)} now", flush=True)
    return not different


def main() -> int:
    """Compares all cases that were asked for; 1 if one differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commit", nargs="?", default="HEAD")
    parser.add_argument("--cases", default=",".join(CASES))
    arguments = parser.parse_args()
    show = ["git", "-C", str(ROOT), "show", f"{arguments.commit}:train_gpt.py"]
    done = subprocess.run(show, capture_output=True)
    if done.returncode:
        said = done.stderr.decode(errors="replace").partition("\n")[0].rstrip(".")
        parser.error(f"{' '.join(show)}: {said}; give a commit of this repository")
    names = arguments.cases.split(",")
    if unknown := set(names) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    with tempfile.TemporaryDirectory() as folder:
        scripts = [Path(folder, version, "train_gpt.py") for version in ("before", "after")]
        for script, source in zip(
            scripts, (done.stdout, (ROOT / "train_gpt.py").read_bytes()), strict=True
        ):
            script.parent.mkdir()
            script.write_bytes(source)
        data = make_data(Path(folder, "data"))
        with ThreadPoolExecutor(2) as pool:
            same = list(pool.map(lambda name: compare(name, scripts, data), names))
    return 0 if all(same) else 1


if __name__ == "__main__":
    sys.exit(main())
