"""Runs the test suite, without the recipes, against named sets of versions, and prints a table of what passed.

    make compat-versions                            # every set
    make compat-versions ARGS="oldest newest"       # some of them
    make compat-versions ARGS="oldest --python python3.10"  # the oldest Python, too
    make compat-versions ARGS="axolotl -- -k fold"  # after --: arguments for pytest

Each set has an environment of its own in build/compat/, which is kept: a second run installs only what has changed.
"theirs" are tests that fail by what the releases do themselves, as `THEIRS` in tests/conftest.py says.
The project is installed without its own bounds on versions: whether these are right is what is measured.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "compat"
CONSTRAINTS = ROOT / "constraints.txt"
COMPARED = ("transformers", "trl", "peft", "accelerate")


def floors() -> dict[str, str]:
    """The oldest releases that pyproject.toml allows, to users and for the recipes."""
    given = map(Requirement, metadata.requires("hf-lnscale") or [])
    wanted = [one for one in given if one.marker is None or one.marker.evaluate({"extra": "train"})]
    return {one.name: bound.version for one in wanted for bound in one.specifier if bound.operator == ">="}


# What is not pinned is the newest release that goes with the pins, but torch is that of constraints.txt. "newest"
# pins COMPARED and torch to the newest releases of the day, and "pinned" everything to constraints.txt.
SETS: dict[str, dict[str, str]] = {
    "oldest": floors(),
    "axolotl": {"transformers": "5.16.1", "trl": "1.9.0", "peft": "0.20.0", "accelerate": "1.13.0"},
    "sglang": {"transformers": "5.19.0"},
    "vllm": {"transformers": "5.20.*"},
    "pinned": {},
    "newest": {},
}


def run(log: Path, *command: object) -> int:
    with log.open("a") as file:
        file.write(f"$ {' '.join(map(str, command))}\n")
        file.flush()
        return subprocess.run([str(part) for part in command], cwd=ROOT, stdout=file, stderr=file).returncode


def requirements() -> list[str]:
    """The names of what the project and its tests need, without versions."""
    names = {re.split(r"[^\w.-]", requirement, maxsplit=1)[0] for requirement in metadata.requires("hf-lnscale") or []}
    return sorted(names - {"hf-lnscale", "torch", "ruff", "mypy"})


def newest(python: Path, name: str) -> str:
    command = [str(python), "-m", "pip", "index", "versions", name]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return str(listed).split("(", 1)[1].split(")", 1)[0]


def install(name: str, interpreter: str, torch: str | None) -> tuple[Path, Path]:
    """Makes the environment of a set, or brings it up to date; returns its folder and the log of what was run."""
    pinned = CONSTRAINTS.read_text().splitlines()
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    version = subprocess.run([interpreter, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    home = BUILD / f"{name}-{version}"
    python, log = home / "bin" / "python", home.with_suffix(f"{home.suffix}.log")
    log.unlink(missing_ok=True)
    if not python.exists():
        subprocess.run([interpreter, "-m", "venv", "--clear", home], check=True)
    pins = SETS[name]
    if name == "newest":
        pins = {package: newest(python, package) for package in COMPARED}
        torch = torch or newest(python, "torch")
    torch = torch or next(line.removeprefix("torch==") for line in pinned if line.startswith("torch=="))
    pip = [python, "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    others = home.with_suffix(f"{home.suffix}.txt")
    others.write_text("\n".join(line for line in pinned if not line.startswith("torch==")))
    constraints = ["--constraint", others] if name == "pinned" else []
    wanted = [f"{package}=={pins[package]}" if package in pins else package for package in requirements()]
    steps = (
        # Without dependencies, as in the Makefile: the build for a CPU, or for this machine's CUDA, is chosen once.
        [*pip, "--no-deps", f"torch=={torch}"],
        # A new environment comes with an old setuptools, which torch 2.6 does not ask to be newer.
        [*pip, "--upgrade", *constraints, f"torch=={torch}", *wanted],
        [*pip, "--no-deps", "--editable", ROOT],
    )
    for step in steps:
        if run(log, *step):
            raise SystemExit(f"{name}: installing failed, see {log.relative_to(ROOT)}")
    return home, log


def row(name: str, home: Path, log: Path, pytest_args: list[str]) -> tuple[str, list[str]]:
    """Runs the tests; returns a line of the table and the tests that failed."""
    python, report = home / "bin" / "python", home / "report.xml"
    report.unlink(missing_ok=True)
    options = ["-p", "no:cacheprovider", "--ignore-glob=*recipe*", f"--junitxml={report}", *pytest_args]
    run(
        log,
        "env",
        "HF_HUB_OFFLINE=1",
        "OMP_NUM_THREADS=1",
        "TOKENIZERS_PARALLELISM=false",
        python,
        "-m",
        "pytest",
        *options,
    )
    if not report.exists():
        raise SystemExit(f"{name}: pytest did not run, see {log.relative_to(ROOT)}")
    code = "import platform, sys; from importlib.metadata import version; print(platform.python_version())"
    code += "; print(*map(version, sys.argv[1:]), sep='\\n')"
    versions = subprocess.run(
        [python, "-c", code, "torch", *COMPARED], check=True, capture_output=True, text=True
    ).stdout
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [one.get("type") for case in cases for one in case.iter("skipped")]
    theirs = skipped.count("pytest.xfail")  # tests/conftest.py names them
    counts = (len(cases) - len(failed) - len(skipped), len(failed), theirs, len(skipped) - theirs)
    cells = [name, *versions.split(), *map(str, counts)]
    return f"| {' | '.join(cells)} |", [f"{case.get('classname')}::{case.get('name')}" for case in failed]


def main() -> None:
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    pytest_args = sys.argv[end + 1 :]
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"of {', '.join(SETS)}; all by default")
    parser.add_argument("--python", default=sys.executable, help="the Python of new environments")
    parser.add_argument("--torch", help="version of torch; by default the set's")
    args = parser.parse_args(sys.argv[1:end])
    if unknown := set(args.sets) - set(SETS):
        parser.error(f"unknown sets: {', '.join(sorted(unknown))}; valid are {', '.join(SETS)}")
    BUILD.mkdir(parents=True, exist_ok=True)
    header = ("set", "Python", "torch", *COMPARED, "passed", "failed", "theirs", "skipped")
    lines, failures = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"], []
    for name in args.sets or SETS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        torch = args.torch or SETS[name].get("torch")
        line, failed = row(name, *install(name, args.python, torch), pytest_args or ["-n", "2", "--dist", "loadgroup"])
        lines.append(line)
        failures += [f"{name}: {test}" for test in failed]
    print("\n".join([*lines, *([""] if failures else []), *failures]))
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
