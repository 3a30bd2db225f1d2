#!/usr/bin/env bash
# The main job, from a bare clone: fine-tune a real encoder, factorise it, score it, tune it again, print a table.
#   bash scripts/quickstart.sh
# Results go to a new folder below logs/quickstart each time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/environment.sh
source scripts/environment.sh

export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
out="logs/quickstart/$(date +%Y%m%d-%H%M%S)"
keep_ratio="${KEEP_RATIO:-0.33}"
lowrank() { python -m lowrank_pl "$@"; }
step() { printf '\n== %s\n' "$*"; }
common=(--config configs/quickstart.yaml --trainer.logger.init_args.save_dir "$out")
named() { common_named=("${common[@]}" --trainer.logger.init_args.name "$1" --trainer.logger.init_args.version ""); }

step "1/6 fine-tune the dense encoder"
named dense
lowrank fit "${common_named[@]}"

step "2/6 score it on the test split"
named test-dense
lowrank test "${common_named[@]}" --model.init_args.init_from "$out/dense/checkpoints/best.ckpt"

step "3/6 factorise it: KroneckerSVD, ranks over all layers, keep_ratio $keep_ratio of the encoder's linear weights"
named compress
strategy=(--model.init_args.strategy KroneckerSVD
  --model.init_args.strategy.init_args.keep_ratio "$keep_ratio")
lowrank compress "${common_named[@]}" "${strategy[@]}" --output "$out/factorised" \
  --model.init_args.init_from "$out/dense/checkpoints/best.ckpt"

step "4/6 score it as it is"
named test-factorised
lowrank test "${common_named[@]}" --model.init_args.init_from "$out/factorised"

step "5/6 tune the factorised encoder for one more epoch"
named tuned
lowrank fit "${common_named[@]}" --trainer.max_epochs 1 --model.init_args.init_from "$out/factorised"

step "6/6 score it"
named test-tuned
lowrank test "${common_named[@]}" --model.init_args.init_from "$out/tuned/checkpoints/best.ckpt"

python scripts/quickstart_table.py "$out"
