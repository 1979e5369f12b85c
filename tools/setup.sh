#!/bin/sh
# Make .venv what pyproject.toml and constraints.txt say, or leave it alone if it already is.
# The stamp holds the inputs' checksum and is written last: an install that was killed leaves none, and is done again.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
stamp=.venv/.complete
want=$(cat pyproject.toml constraints.txt tools/setup.sh | cksum)

ready() { [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ] && [ -x .venv/bin/python ]; }
ready && exit 0

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  echo "Pretext needs Python 3.11 or newer; '$python' is $("$python" --version 2>/dev/null || echo missing). Say which: make setup PYTHON=python3.12" >&2
  exit 2
fi
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
  echo "this Python has no venv module: on Debian or Ubuntu, apt install python3-venv" >&2
  exit 2
fi

# two commands started at once: the second waits, then finds the work done
if command -v flock >/dev/null 2>&1; then
  exec 9>.venv.lock
  flock 9
  ready && { rm -f .venv.lock; exit 0; }
fi

echo "setting up .venv (once; some minutes, most of it PyTorch)"
if [ -f "$stamp" ] && [ -x .venv/bin/python ]; then rm -f "$stamp"; else rm -rf .venv && "$python" -m venv .venv; fi
# A signal to this shell alone would leave pip at work: it is stopped too.
stop() {
  trap - TERM INT HUP
  kill "$pip" 2>/dev/null || true
  wait "$pip" 2>/dev/null || true
  exit "$1"
}
install() {
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@" >.venv/install.log 2>&1 &
  pip=$!
  trap 'stop 143' TERM
  trap 'stop 130' INT
  trap 'stop 129' HUP
  wait "$pip" || {
    tail -n 20 .venv/install.log >&2
    echo "pip failed: its last words are above, all of them in .venv/install.log" >&2
    exit 1
  }
  trap - TERM INT HUP
}
# the pins were tested with the newest pip; an older one would do as well
install --upgrade pip
install -c constraints.txt -e '.[dev,detection,emoji,slurm,video]'
.venv/bin/python -c 'import torch, torchvision, lightning, timm; torchvision.ops.nms'
printf '%s' "$want" > "$stamp"
rm -f .venv.lock
