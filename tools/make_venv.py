"""Makes .venv with torch in it: python3 -m tools.make_venv

`make` calls this. A torch that is already there is reused: the one in .venv, or that of the Python
which runs this script, which a new .venv then shares. Otherwise torch is installed. Without an
NVIDIA GPU that is a CPU build, if one can be had, because the ordinary Linux build brings gigabytes
of CUDA libraries; a line says so before these are downloaded. TORCH="torch==2.11.0" in the
environment asks for that release and shares nothing, TORCH="torch==2.11.0+cpu" for its CPU build
alone.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

VENV = Path(".venv")
VENV_PYTHON = str(VENV / "bin" / "python")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Ignores this machine's pip configuration, in which a mirror could offer the CUDA build, and gives
# up soon.
CPU_OPTIONS = ["--isolated", "--index-url", CPU_INDEX, "--timeout", "10", "--retries", "1"]
FALLBACK = "torch==2.13.0"  # some machines keep a CPU build of this release on their disk
SIZE_WARNING = (
    "torch now comes from where pip usually finds it, on Linux with gigabytes of CUDA libraries; "
    "to do without them, stop this (Ctrl-C) and make with PYTHON=one that has torch, or with "
    f'TORCH="{FALLBACK}+cpu"'
)


def fail(message: str) -> None:
    """Ends the program with one line and the status of a user's mistake."""
    # Nothing is imported for it: this file has to start under any Python, to say what is too old.
    print(f"make_venv.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def output(*command: str) -> str:
    """What a command prints, or "" if it cannot run or fails."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def find_torch(python: str) -> str:
    """The version of torch that this Python can import, or "" if it has none that will do.

    requirements.txt says how old it may be.
    """
    version = output(python, "-c", "import torch; print(torch.__version__)")
    if not version:
        return ""
    major, minor = version.split(".")[:2]
    return version if (int(major), int(minor)) >= (2, 9) else ""


def make_venv(*options: str) -> None:
    """A new .venv in place of what is there."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", *options, str(VENV)], check=True)


def install(requirement: str, *options: str, **environment: str) -> bool:
    """Whether pip could install it in .venv; its messages are shown."""
    pip = [VENV_PYTHON, "-m", "pip", "install", "--disable-pip-version-check"]
    command = [*pip, *options, requirement]
    print("+", " ".join(command), flush=True)
    done = subprocess.run(command, env=os.environ | environment).returncode == 0
    if not done:
        print(f"make_venv.py: no success with {requirement} {' '.join(options)}", flush=True)
    return done


def prepare_venv(may_share: bool) -> None:
    """Makes .venv unless it works already, sharing this Python's torch if it may and can."""
    if not output(VENV_PYTHON, "--version"):
        share = may_share and find_torch(sys.executable)
        make_venv(*["--system-site-packages"] * bool(share))
        # That of another virtual environment cannot be shared.
        if share and not find_torch(VENV_PYTHON):
            make_venv()
    elif not output(VENV_PYTHON, "-m", "pip", "--version"):  # made by a tool that leaves pip out
        subprocess.run([VENV_PYTHON, "-m", "ensurepip"], check=True)


def main() -> None:
    """Makes .venv, and installs torch in it where there is none."""
    wanted = os.environ.get("TORCH", "")
    prepare_venv(may_share=not wanted)
    if not wanted and (version := find_torch(VENV_PYTHON)):
        print(f".venv uses torch {version}, which was already there")
        return
    has_gpu = shutil.which("nvidia-smi") and output("nvidia-smi", "-L")
    if not has_gpu and install(wanted or "torch", *CPU_OPTIONS, PIP_CONFIG_FILE=os.devnull):
        return
    # Without that index: what this machine's own configuration finds.
    if not wanted.endswith("+cpu"):
        why = "there is an NVIDIA GPU" if has_gpu else f"no CPU build from {CPU_INDEX}"
        print(f"make_venv.py: {why}: {SIZE_WARNING}", flush=True)
    if wanted:
        choices = [wanted]
    elif has_gpu:
        choices = ["torch"]
    else:
        choices = [FALLBACK, "torch"]
    if not any(install(choice) for choice in choices):
        fail("torch could not be installed; pip's messages above say why")


if __name__ == "__main__":
    if sys.version_info < (3, 10):  # noqa: UP036 - the Python that make finds may be any
        fail("this project needs Python 3.10 or newer: make PYTHON=python3.12 ...")
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(__doc__)
        sys.exit(0)
    if sys.argv[1:]:
        fail(f"{sys.argv[1]}: it takes no arguments; --help says what it does")
    try:
        main()
    except subprocess.CalledProcessError as error:
        command = " ".join(error.cmd)
        fail(f"{command} failed; on Debian and Ubuntu, install python3-venv")
