#!/usr/bin/env bash
# Everything that has to pass: lint, format, types, tests. Arguments go to pytest: scripts/test.sh tests/core -k svd
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

export TOKENIZERS_PARALLELISM=false # warns and may lock when the data loader forks
export HF_HUB_OFFLINE=1             # tests bring their own models and data
export OMP_NUM_THREADS=1            # one per worker: pytest-xdist fills the cores already

python -m ruff check .
python -m ruff format --check .
python -m mypy
# Files are handed out in the order of tests/conftest.py, the long ones first.
python -m pytest -n auto --dist loadfile --no-loadscope-reorder "$@"
