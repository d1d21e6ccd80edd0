#!/usr/bin/env bash
# Everything that a GPU can tell about hf_lnscale, in under ten minutes: one command for whoever has one.
#
#   pip install '.[train]' pytest bitsandbytes liger-kernel && bash benchmarks/gpu.sh
#   bash benchmarks/gpu.sh --smoke    # the same lines in a small form, on a CPU too: minutes, and no figure worth reading
#
# Prints the tests that need a GPU and the tables for docs/results.md.
set -euo pipefail
cd "$(dirname "$0")/.."
has() { python -c "import importlib.util as i, sys; sys.exit(i.find_spec('$1') is None)"; }

if [ "${1:-}" = --smoke ]; then
	slower=8 tests=(bf16 --collect-only) # they run in the suite
	step="--size tiny --batch 2 --length 32 --count 2"
	large=$step setups=$step depth=$step
	eager="" # the next line's
	cost="--part scores --part search --sequences 4 --length 16 --count 1 --size tiny"
	prune="--part prune --sequences 24 --length 32 --size tiny"
	diagnosis="--sequences 4 --length 32 --count 2"
else
	python -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "benchmarks/gpu.sh: no CUDA device found")'
	nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
	slower=1 tests=("liger or kernel or compile or bf16")
	step="--size 130M --batch 16 --length 512 --count 25"
	eager="--mode eager"
	large="--size 1B --batch 4 --length 1024 --count 10"
	setups="--size 130M --batch 16 --length 512 --count 20" # the batch is that of all GPUs: at most 16 of them
	depth="--size 130M --batch 16 --length 512 --count 20"
	cost="--count 10"
	prune="--part prune --sequences 64 --length 512 --size 1B"
	diagnosis="--count 10"
fi
more=""
# Triton, which Liger is written in, needs a GPU.
if [ "${1:-}" != --smoke ] && has liger_kernel; then more="--mode liger"; fi
qlora=""
if has bitsandbytes; then qlora="--setup QLoRA"; fi

export PYTHONPATH="tests${PYTHONPATH:+:$PYTHONPATH}"
# A line that fails or takes too long is named at the end; the others are run all the same.
failed=""
run() { timeout $((slower * $1)) "${@:2}" || failed="$failed${failed:+, }${*:2}"; }
# shellcheck disable=SC2086  # each variable holds words
{
	run 90 python -m pytest -p no:xdist tests/core/test_composition.py tests/core/test_training_math.py -rs -k "${tests[@]}"
	run 120 python benchmarks/ln_scaling_overhead.py $step --mode compile $eager $more
	run 80 python benchmarks/ln_scaling_overhead.py $large --mode eager $more
	run 80 python benchmarks/training_setups.py $setups --setup DDP --setup FSDP2 $qlora
	run 40 python benchmarks/depth_stats.py $depth
	run 60 python benchmarks/pruning_cost.py $cost
	run 80 python benchmarks/pruning_cost.py $prune
	run 40 python benchmarks/diagnosis_cost.py $diagnosis
}
if [ -n "$failed" ]; then
	echo "benchmarks/gpu.sh: failed or ran out of time: $failed" >&2
	exit 1
fi
