#!/usr/bin/env bash
# Everything that a GPU can tell about hf_lnscale, in at most ten minutes: one command for whoever has one.
#
#   pip install '.[train]' pytest bitsandbytes liger-kernel && bash benchmarks/gpu.sh
#   bash benchmarks/gpu.sh --smoke    # the same lines in a small form, on a CPU too: minutes, and no figure worth reading
#
# Prints the tests that need a GPU and the tables for docs/results.md.
set -euo pipefail
cd "$(dirname "$0")/.."
has() { python -c "import importlib.util as i, sys; sys.exit(i.find_spec('$1') is None)"; }

if [ "${1:-}" = --smoke ]; then
	slower=8 tests=--collect-only # without a GPU they are skipped
	step="--size tiny --batch 2 --length 32 --count 2"
	setups=$step depth=$step
	cost="--sequences 4 --length 16 --count 1 --size tiny"
	prune="--part prune --sequences 24 --length 32" sizes=tiny
	diagnosis="--sequences 4 --length 32 --count 2"
else
	python -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "benchmarks/gpu.sh: no CUDA device found")'
	nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
	slower=1 tests=-rs
	step="--size 130M --batch 16 --length 512 --count 25"
	setups="--size 130M --batch 16 --length 512 --count 20" # the batch is that of all GPUs: at most 16 of them
	depth="--size 130M --batch 16 --length 512 --count 20"
	cost="--count 10"
	prune="--part prune --sequences 64 --length 512" sizes="1B 7B" # 7B needs a GPU of 24 GB
	diagnosis="--count 10"
fi
liger=""
# Triton, which Liger is written in, needs a GPU.
if [ "${1:-}" != --smoke ] && has liger_kernel; then liger=liger; fi
qlora=""
if has bitsandbytes; then qlora="--setup QLoRA"; fi

export PYTHONPATH="tests${PYTHONPATH:+:$PYTHONPATH}"
# A line that fails or takes too long is named at the end; the others are run all the same.
failed=""
run() {
	local limit=$((slower * $1)) left=$((slower * 600 - SECONDS))
	if ((left < limit)); then limit=$((left > 0 ? left : 1)); fi # a limit of 0 is none
	timeout "$limit" "${@:2}" || failed="$failed${failed:+, }${*:2}"
}
# shellcheck disable=SC2086  # each variable holds words
{
	run 60 python -m pytest -p no:xdist tests/core -m gpu $tests
	for mode in eager $liger; do run 90 python benchmarks/ln_scaling_overhead.py $step --mode $mode; done
	run 150 python benchmarks/ln_scaling_overhead.py $step --mode compile
	run 80 python benchmarks/training_setups.py $setups --setup DDP --setup FSDP2 $qlora
	run 40 python benchmarks/depth_stats.py $depth
	run 60 python benchmarks/pruning_cost.py --part scores --part search $cost
	for size in $sizes; do run 60 python benchmarks/pruning_cost.py $prune --size $size; done
	run 40 python benchmarks/diagnosis_cost.py $diagnosis
}
if [ -n "$failed" ]; then
	echo "benchmarks/gpu.sh: failed or ran out of time: $failed" >&2
	exit 1
fi
