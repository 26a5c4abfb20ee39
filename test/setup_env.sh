#!/usr/bin/env bash
# Finds or makes a Python that has what the project needs. The last line printed is the interpreter's path.
#
#   bash test/setup_env.sh [REQUIREMENTS_FILE]      (default: requirements.txt; requirements-npu.txt where CANN is)
#
# PYTHON=/some/python, or else an active virtual environment, is used as it is if it satisfies the requirements.
# Otherwise .venv is made in the repository, once, and installed into again whenever the requirements change.
# All talk goes to standard error, the path alone to standard output.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

default_requirements=requirements.txt
if bash test/find_cann.sh >/dev/null; then
    default_requirements=requirements-npu.txt
elif compgen -G "/dev/davinci[0-9]*" >/dev/null; then
    echo "setup_env.sh: there is an Ascend NPU (/dev/davinci*) and no CANN; training would run on the CPU. Install CANN," >&2
    echo "  or say where it is: ASCEND_HOME_PATH=FOLDER (docs/ascend.md)" >&2
fi
requirements=${1:-$default_requirements}
[ -f "$requirements" ] || { echo "setup_env.sh: no requirements file $requirements" >&2; exit 2; }

satisfies() { "$1" test/check_requirements.py "$requirements" >/dev/null 2>&1; }

if [ -n "${PYTHON:-}" ]; then
    python=$(command -v "$PYTHON") || { echo "setup_env.sh: PYTHON=$PYTHON is not an interpreter" >&2; exit 2; }
    if ! lacking=$("$python" test/check_requirements.py "$requirements"); then
        echo "setup_env.sh: PYTHON=$PYTHON does not satisfy $requirements; it lacks:" >&2
        echo "$lacking" >&2
        echo "Install them (\"$PYTHON\" -m pip install -r $requirements), or unset PYTHON to have a .venv made." >&2
        exit 2
    fi
    echo "$python"
    exit 0
fi

active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
if [ -n "$active" ] && [ -x "$active/bin/python" ] && satisfies "$active/bin/python"; then
    echo "using the active environment $active" >&2
    echo "$active/bin/python"
    exit 0
fi

# The stamp is the text of every requirements file, so that a change in any of them is noticed.
# Each requirements file has a stamp of its own: the test set contains the training set.
exec 9>.venv.lock
flock 9
stamp=.venv/.installed-$(basename "$requirements" .txt)
wanted=$(cat requirements*.txt | sha256sum | cut -d' ' -f1)
if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    echo "$PWD/.venv/bin/python"
    exit 0
fi

if [ ! -x .venv/bin/python ] || ! .venv/bin/python -c '' 2>/dev/null; then
    for candidate in python3 python3.12 python3.11 python3.13 python3.10; do
        # A name on PATH may be a version manager's stub that runs nothing: ask it.
        if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null; then
            base=$candidate
            break
        fi
    done
    [ -n "${base:-}" ] || { echo "setup_env.sh: needs python3, 3.10 to 3.13, on PATH" >&2; exit 2; }
    echo "making .venv with $("$base" --version)" >&2
    "$base" -m venv --clear .venv >&2 || {
        echo "setup_env.sh: $base cannot make a virtual environment (on Debian: apt-get install python3-venv)" >&2
        exit 2
    }
fi
echo "installing $requirements into .venv (some minutes the first time)" >&2
# The registry's torch for Linux brings 5 GB of CUDA and NVIDIA's triton, which an Ascend machine has no use for; PyTorch's
# own index has the same release without. An empty PYTORCH_CPU_INDEX leaves this out.
pytorch_index="https://download.pytorch.org/whl/cpu"
cpu_index=${PYTORCH_CPU_INDEX-$pytorch_index}
if [ "$(basename "$requirements")" = requirements-npu.txt ] && [ -n "$cpu_index" ]; then
    readarray -t torch < <(grep -E "^torch(vision)?==" "$requirements")
    if ! .venv/bin/python -m pip install --progress-bar off --no-deps --index-url "$cpu_index" "${torch[@]}" >&2; then
        echo "setup_env.sh: $cpu_index has not given ${torch[*]} (see above); the registry's follows, with CUDA" >&2
    fi
fi
if ! .venv/bin/python -m pip install --progress-bar off -r "$requirements" >&2; then
    echo "setup_env.sh: pip could not install $requirements (see above); is a package registry in reach?" >&2
    exit 1
fi
echo "$wanted" > "$stamp"
echo "$PWD/.venv/bin/python"
