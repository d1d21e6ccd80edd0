#!/usr/bin/env bash
# Everything that a GPU can tell about hf_lnscale, in under ten minutes: one command for whoever has one.
#
#   pip install hf-lnscale[train] pytest liger-kernel && bash benchmarks/gpu.sh
#
# Prints the tests that need a GPU and the tables for docs/results.md.
set -euo pipefail
cd "$(dirname "$0")/.."
python -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "benchmarks/gpu.sh: no CUDA device found")'
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
liger=$(python -c 'import importlib.util as i; print("--mode liger" if i.find_spec("liger_kernel") else "")')
export PYTHONPATH="tests${PYTHONPATH:+:$PYTHONPATH}"
python -m pytest tests/core/test_composition.py tests/core/test_training_math.py -k "liger or kernel or compile or bf16" -rs
# shellcheck disable=SC2086  # one word or none
timeout 150 python benchmarks/ln_scaling_overhead.py --size 130M --batch 16 --length 512 --count 25 --mode eager --mode compile $liger
# shellcheck disable=SC2086
timeout 100 python benchmarks/ln_scaling_overhead.py --size 1B --batch 4 --length 1024 --count 10 --mode eager $liger
timeout 60 python benchmarks/depth_stats.py --size 130M --batch 16 --length 512 --count 20
timeout 80 python benchmarks/pruning_cost.py --count 10
timeout 60 python benchmarks/diagnosis_cost.py --count 10
