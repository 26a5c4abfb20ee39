#!/usr/bin/env bash
# Sets up what is missing, then lints, checks types and import directions, and runs the tests, on up to four cores.
#
#   bash test/run_tests.sh [--all] [PYTEST_ARGUMENT ...]
#
# --all adds the long tests (the whole demo among them). With pytest arguments (-k NAME, a path) only pytest runs, in
# one process.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

selection=()
if [ "${1:-}" = --all ]; then selection=(-m "all or not all"); shift; fi  # pyproject.toml leaves the long ones out

python=$(bash test/setup_env.sh requirements-test.txt | tail -n 1)
bin=$(dirname "$python")
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # the tests' models are tiny: more threads wait more than they compute
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false

if [ $# -eq 0 ]; then
    "$python" -m ruff check .
    "$python" -m ruff format --check .
    "$python" -m mypy
    "$bin/lint-imports"
    set -- -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder  # what a file's tests share is made once
fi
exec "$python" -m pytest "${selection[@]}" "$@"
