"""How long imports take, in pairs of new processes: a transformers class with and without the plugin, and the command
line's help against an empty Python process.

    python benchmarks/import_time.py [--repeats 7]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

CLASS = "from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_config"
MODEL = "from transformers import LlamaForCausalLM"

# Name: the command line, the one it is compared with, and the maximum difference in seconds.
PAIRS = {
    "import hf_lnscale": (["-c", "import hf_lnscale"], ["-c", "pass"], 0.1),
    "hf_lnscale, AutoModelForCausalLM": (["-c", f"import hf_lnscale; {CLASS}"], ["-c", CLASS], 0.1),
    "hf_lnscale, LlamaForCausalLM": (["-c", f"import hf_lnscale; {MODEL}"], ["-c", MODEL], 0.1),
    "hf-lnscale --help": (["-m", "hf_lnscale", "--help"], ["-c", "pass"], 0.5),
}


def seconds(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="number of pairs of processes")
    repeats = parser.parse_args().repeats
    print(f"{'seconds, median of ' + str(repeats):34}   with  alone  longer by            range  at most")
    for name, (with_plugin, alone, limit) in PAIRS.items():
        seconds(with_plugin), seconds(alone)  # so that the files are in the disk cache
        pairs = [(seconds(with_plugin), seconds(alone)) for _ in range(repeats)]
        longer = sorted(first - second for first, second in pairs)
        first, second = (statistics.median(column) for column in zip(*pairs, strict=True))
        spread = f"{longer[0]:.2f} ... {longer[-1]:.2f}"
        print(f"{name:34} {first:6.2f} {second:6.2f} {statistics.median(longer):10.2f} {spread:>16} {limit:8.1f}")


if __name__ == "__main__":
    main()
