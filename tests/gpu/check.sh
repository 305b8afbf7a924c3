#!/usr/bin/env bash
# cross-job on one GPU, on a machine with Python 3.12, torch, numpy and pyarrow, and without network.
#
#     tests/gpu/pack.py                       # where there is a network: makes out/gpu-wheels, below 64 MiB
#     tests/gpu/check.sh                      # on the machine: below 8 minutes
#     tests/gpu/check.sh --device cpu         # the same path on a CPU
#
# Makes an environment of the wheels in a temporary folder, and in it runs two submitted Ray jobs on half a GPU each:
# the demo (models and rollouts on the device, weights through shared memory), then hand-overs of 1, 10 and 100 MB from
# device to device, and of weights through shared memory and by CUDA IPC. NCCL needs a GPU for each rank: it is not run.
# Writes result.json and logs to --out (default: $OUT, else out/gpu); the last line is "passed in N s" or "failed: WHY".
#
# It has NOT been run on a GPU yet; with --device cpu it has.
#
# Options: --device cuda|cpu, --out FOLDER, --wheels FOLDER, --rollouts N (of the demo, default 80; it must have learnt
# by then), --deadline-s N (default 470, of all). PYTHON names the interpreter that has torch (default: python3).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3} device=cuda wheels=$root/out/gpu-wheels out=${OUT:-$root/out/gpu} rollouts=80 deadline_s=470

fail() {
    echo "failed: $*"
    exit 2
}

while [ $# -gt 0 ]; do
    [ $# -gt 1 ] || fail "$1 needs a value"
    case $1 in
    --device) device=$2 ;;
    --out) out=$2 ;;
    --wheels) wheels=$2 ;;
    --rollouts) rollouts=$2 ;;
    --deadline-s) deadline_s=$2 ;;
    *) fail "unknown option $1: the head of this script tells all" ;;
    esac
    shift 2
done
case $device in cuda | cpu) ;; *) fail "--device $device: cuda or cpu" ;; esac

unset PYTHONPATH PYTHONHOME
there=$("$python" - "$device" <<'END'
import sys
from pathlib import Path
try:
    import numpy, pyarrow, torch
except ImportError as error:
    sys.exit(f"failed: {sys.executable} needs torch, numpy and pyarrow: {error}; PYTHON names another interpreter")
if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit(f"failed: torch {torch.__version__} finds no GPU here (torch.cuda.is_available() is False); nothing was run")
print(*sorted({str(Path(module.__file__).parents[1]) for module in (numpy, pyarrow, torch)}), sep="\n")
END
) || exit 2

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/wheels"
[ -e "$wheels/SHA256SUMS" ] || fail "no wheels in $wheels: tests/gpu/pack.py makes them"
(cd "$wheels" && sha256sum --quiet -c SHA256SUMS) || fail "damaged wheels in $wheels: carry them again"
cp "$wheels"/*.whl "$work/wheels"
for first in "$wheels"/*.whl.00; do
    [ ! -e "$first" ] || cat "${first%.00}".[0-9][0-9] >"$work/wheels/$(basename "${first%.00}")"
done
"$python" -m venv --without-pip "$work/venv"
pip=("$work"/wheels/pip-*.whl) # runs as it is: the machine need not have one
"$work/venv/bin/python" "${pip[0]}/pip" --isolated install -q --no-index --no-deps --no-compile \
    --no-cache-dir --disable-pip-version-check "$work"/wheels/*.whl || fail "pip could not install the wheels of $wheels"
# The interpreter may be of an environment itself, whose packages --system-site-packages would not show.
site=$("$work/venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')
while read -r folder; do
    echo "import site; site.addsitedir('$folder')"
done <<<"$there" >"$site/torch_of_the_machine.pth"
echo "environment of $(find "$work/wheels" -name '*.whl' | wc -l) wheels made in $SECONDS s"

left_s=$((deadline_s - SECONDS - 30)) # 30: for the end of the cluster
timeout -k 10 $((left_s + 25)) "$work/venv/bin/python" "$root/tests/gpu/check.py" --device "$device" --out "$out" \
    --rollouts "$rollouts" --deadline-s "$left_s"
