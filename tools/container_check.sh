#!/usr/bin/env bash
# What a machine that was just set up has to be able to do, without network: the Dockerfile runs it
# in the image, .ci/run in a fresh copy of the tree, and you where you like.
#
#     tools/container_check.sh                  everything: a whole demo, all tests, the whole audit
#     CHECK=quick tools/container_check.sh      a minute or two on two cores: a few steps, the tests
#                                               of the published artifact, four checks of the audit
#     PYTHON=.venv/bin/python tools/container_check.sh
#
# In short, parts that do not need each other run in two rows at once. Each part says how many seconds
# it took. It writes to a temporary folder alone, which it removes. Exit status: 0 if all went well,
# 1 if a part failed, 2 if it was started wrongly.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

check=${CHECK:-all}
python=${PYTHON:-python3}
case $check in
quick | all) ;;
*)
    echo "container_check.sh: error: CHECK=$check should be quick or all" >&2
    exit 2
    ;;
esac
if ! "$python" -c 'import numpy, sentencepiece, torch' 2>/dev/null; then
    echo "container_check.sh: error: $python lacks a package: pip install -r requirements.txt" >&2
    exit 2
fi

# Only this script's own choices: a setting left in the shell would change what is run.
mapfile -t inherited < <(compgen -e | grep -Ev '^(PATH|HOME|LANG|LC_.*|TMPDIR|USER|CUDA_.*|NVIDIA_.*|LD_LIBRARY_PATH|OMP_.*|TORCHINDUCTOR_CACHE_DIR|TRITON_CACHE_DIR)$')
for name in "${inherited[@]}"; do
    unset "$name"
done
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} PYTHONDONTWRITEBYTECODE=1

work=$(mktemp -d)
beside=  # the processes at work beside the others
trap '[[ -z $beside ]] || kill -- "-$beside" 2>/dev/null; rm -rf "$work"' EXIT
data=data/tiny
artifact=$data/tiny.int6.lzma
touch "$work/failed"

# part TITLE COMMAND…: runs it, shows the end of what it said, and remembers if it failed. What is
# shown comes in one piece, for another part may be at work beside it.
part() {
    local title=$1 start=$SECONDS status=0 output said
    output=$work/$2.output
    shift
    echo "== $title"
    "$@" >"$output" 2>&1 || status=$?
    said=$(tail -n "${lines:-3}" "$output" | cut -c1-200)
    if [[ $status != 0 ]]; then
        echo "$title" >>"$work/failed"
        tail -n 40 "$output" | cut -c1-400 >&2
    fi
    printf '%s\n== %s: status %s, %s s\n' "$said" "$title" "$status" "$((SECONDS - start))"
}

# network: the interfaces that are up besides the loopback; processes of one run meet on that.
network() {
    if command -v ip >/dev/null && [[ $(id -u) == 0 ]]; then
        ip link set lo up 2>/dev/null || true
    fi
    local others
    others=$(awk 'NR > 2 && $1 != "lo:" {printf "%s ", $1}' /proc/net/dev)
    echo "network: ${others:-none}"
    if [[ -n $others ]]; then
        echo "nothing below uses it; to be sure: docker run --network none, or unshare -rn"
    fi
}

machine() {
    "$python" --version
    "$python" -c 'import torch; print("torch", torch.__version__, "GPUs:", torch.cuda.device_count())'
}

sample() {
    "$python" data/prepare.py sample --out "$work/sample"
}

demo() {
    local settings=(PRESET=tiny RUN_ID=demo LOG_DIR="$work" DATA_PATH="$work/sample")
    settings+=(TOKENIZER_PATH="$work/sample/sample_1024_bpe.model")
    if [[ $check == quick ]]; then
        settings+=(DEVICE=cpu ITERATIONS=3 MAX_WALLCLOCK_SECONDS=0 CALIBRATION_TOKENS=1024)
        settings+=(EVAL_MODE=plain TTT_ENABLED=0)
    fi
    env "${settings[@]}" "$python" train_gpt.py
    "$python" -m tools.summary "$work/demo.jsonl"
}

score() {
    # All else is in the log beside the artifact.
    local settings=(EVAL_ONLY=1 DEVICE=cpu LOG_DIR="$work" RUN_ID=tiny ARTIFACT="$artifact")
    settings+=(SAMPLE_PROMPT="The function returns" SAMPLE_TOKENS=40)
    env "${settings[@]}" "$python" train_gpt.py
}

# The audit's status is 4 where nothing can isolate it, as in some containers, and 5 where a check
# was left out or has nothing to compare with: the log is not given, since it is of an older script.
audit() {
    local options=(--data "$data" --tokenizer "$data/tokenizer.model") status=0
    if [[ $check == quick ]]; then
        options+=(--checks "script,isolation,bytes,score")
    fi
    PRESET=tiny DEVICE=cpu "$python" -m tools.audit $artifact "${options[@]}" || status=$?
    case $status in
    0) ;;
    4 | 5) echo "audit: nothing fails; its status is $status" ;;
    *) return "$status" ;;
    esac
}

report() {
    "$python" -m tools.report $data/tiny.jsonl "$work/demo.jsonl" --static --out "$work/report.html"
}

convert() {
    "$python" -m tools.convert $artifact --out "$work/tiny.safetensors"
    "$python" -m tools.convert "$work/tiny.safetensors" --out "$work/again.lzma"
    cmp $artifact "$work/again.lzma" && echo "there and back: the same bytes"
}

tests() {
    if [[ $check == quick ]]; then
        "$python" -m pytest -q -p no:cacheprovider tests/test_published.py
    else
        "$python" -m pytest -q -p no:cacheprovider -n 2 --dist loadfile
    fi
}

# Parts that need nothing of each other but in their order.
made_here() {
    part "sample text" sample
    lines=12 part "demo" demo
    part "report of both runs" report
    part "safetensors and back" convert
}

published() {
    lines=12 part "score of the published artifact" score
    lines=30 part "audit of the published artifact" audit
    part "tests" tests
}

network
part "machine" machine
if [[ $check == quick ]]; then
    # Each uses one core. A whole demo trains by the clock: nothing is to run beside that.
    set -m # a group of its own, which ends when this script does
    made_here &
    beside=$!
    set +m
    published
    wait "$beside" || echo "the parts beside these" >>"$work/failed"
    beside=
else
    made_here
    published
fi

if [[ -s $work/failed ]]; then
    sed 's/^/container_check.sh: failed: /' "$work/failed" >&2
    exit 1
fi
echo "container_check.sh: CHECK=$check holds, ${SECONDS} s"
