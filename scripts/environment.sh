#!/usr/bin/env bash
# The development environment: a virtual environment with the versions of constraints.txt and this package, editable.
#
#   bash scripts/environment.sh        creates or updates it
#   source scripts/environment.sh      the same, and activates it in this shell (bash)
#
# A stamp inside the environment remembers what it was made from; a second run finds it and installs nothing.
#
#   LOWRANK_PL_VENV         where it lies, instead of .venv beside this repository's pyproject.toml
#   LOWRANK_PL_TORCH_INDEX  a further index for torch alone. On Linux the one of PyPI brings CUDA along (gigabytes);
#                           https://download.pytorch.org/whl/cpu has the build without it.
#   PYTHON                  the interpreter that creates the environment, instead of python3

lowrank_pl_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
lowrank_pl_venv="${LOWRANK_PL_VENV:-$lowrank_pl_root/.venv}"
# The environment has to be found again from any folder.
case "$lowrank_pl_venv" in /*) ;; *) lowrank_pl_venv="$PWD/$lowrank_pl_venv" ;; esac

if [[ "${BASH_SOURCE[0]}" != "$0" ]]; then
    # Installing happens in a process of its own: its strictness would close an interactive shell on the first error.
    LOWRANK_PL_VENV="$lowrank_pl_venv" bash "${BASH_SOURCE[0]}" || return 1
    export VIRTUAL_ENV="$lowrank_pl_venv" PATH="$lowrank_pl_venv/bin:$PATH"
    return 0
fi

set -euo pipefail

say() { echo "environment: $*" >&2; }

fail() {
    say "$*"
    exit 1
}

check_python() { # interpreter, remedy
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$1 is $("$1" --version 2>&1), and Python 3.10 or later is needed. $2"
}

stamp() {
    "$python" - "$lowrank_pl_root" <<'PYTHON'
import hashlib, pathlib, sys

root = pathlib.Path(sys.argv[1])
told = hashlib.sha256(f"{root} {sys.version}".encode())  # the package is installed by its path
for name in ("pyproject.toml", "constraints.txt"):
    told.update((root / name).read_bytes())
print(told.hexdigest())
PYTHON
}

python="$lowrank_pl_venv/bin/python"
if ! "$python" -m pip --version >/dev/null 2>&1; then
    creator="${PYTHON:-python3}"
    command -v "$creator" >/dev/null || fail "$creator was not found. Install Python 3.10 or later, or set PYTHON to one."
    check_python "$creator" "Set PYTHON to a later one, e.g. PYTHON=python3.12."
    if [[ -e "$lowrank_pl_venv" && ! -f "$lowrank_pl_venv/pyvenv.cfg" && -n "$(ls -A "$lowrank_pl_venv")" ]]; then
        fail "$lowrank_pl_venv exists and is no virtual environment. Set LOWRANK_PL_VENV to a new folder."
    fi
    say "creating $lowrank_pl_venv with $("$creator" --version)"
    # --clear: an environment that is there already has no working pip.
    "$creator" -m venv --clear "$lowrank_pl_venv" ||
        fail "python -m venv failed; on Debian and Ubuntu it comes with the package python3-venv."
fi
check_python "$python" "Remove $lowrank_pl_venv and run this again with PYTHON set to a later one."

if command -v flock >/dev/null; then # two runs at a time would install into each other
    exec 9>"$lowrank_pl_venv/.lowrank_pl_lock"
    flock 9
fi

stamp_file="$lowrank_pl_venv/.lowrank_pl_stamp"
made_from="$(stamp)"
if [[ -f "$stamp_file" && "$(<"$stamp_file")" == "$made_from" ]]; then
    exit 0
fi
rm -f "$stamp_file" # an interrupted installation must not look finished

install() { "$python" -m pip install --quiet --disable-pip-version-check -c "$lowrank_pl_root/constraints.txt" "$@"; }

torch="$(sed -nE 's/^(torch==[^ ;]+).*/\1/p' "$lowrank_pl_root/constraints.txt")"
[[ -n "$torch" ]] || fail "constraints.txt has no line torch==<version>."
say "installing $torch"
install ${LOWRANK_PL_TORCH_INDEX:+--extra-index-url "$LOWRANK_PL_TORCH_INDEX"} "$torch"
say "installing lowrank-pl[dev,offline,onnx,peft,lm-eval], editable"
install -e "$lowrank_pl_root[dev,offline,onnx,peft,lm-eval]"
echo "$made_from" >"$stamp_file"
say "ready: $lowrank_pl_venv"
