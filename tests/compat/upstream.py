"""Runs transformers' and PEFT's own tests over models of ours, and prints a table of what passed.

    make compat                                      # both, every family
    make compat ARGS="transformers -k llama"         # further arguments go to pytest
    make compat TRANSFORMERS=../transformers         # a checkout of the installed version in place of its sdist

Each test is run without the plugin, with the plugin imported, with LayerNorm Scaling in the configuration, and in the
middle of a warmup; those that pass without the plugin, and do not otherwise, are named. The tests come from the source
distributions of the installed versions, into build/compat/. That of transformers holds only the files tests/test_*.py:
the tests of generation and of export, which its model tests inherit, are in a checkout alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build" / "compat" / "upstream"
MODES = ("without", "imported", "scaled", "warmup")
NEEDED = {"transformers": ["parameterized"], "peft": ["diffusers", "importlib_metadata", "zipp"]}
# What test_modeling_common.py and test_configuration_common.py import, and the source distribution does not hold.
LEFT_OUT = {
    "exporters/test_export.py": "class ExportTesterMixin: pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin: pass\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
}


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments), "--quiet", "--no-deps", "--disable-pip-version-check"]
    subprocess.run(command, check=True)


def sources(package: str) -> Path:
    """The folder that holds `tests/` of the installed version of a package."""
    name = f"{package}-{version(package)}"
    if checkout := os.environ.get(package.upper()):
        said = (Path(checkout) / "src" / package / "__init__.py").read_text()
        if f'__version__ = "{version(package)}"' not in said:
            raise SystemExit(f"{checkout} is not a checkout of {name}; try: git checkout v{version(package)}")
        return Path(checkout).resolve()
    if not (BUILD / name).exists():
        pip("download", "--no-binary", package, "--dest", BUILD, name.replace("-", "=="))
        shutil.unpack_archive(BUILD / f"{name}.tar.gz", BUILD, filter="data")
    for file, content in LEFT_OUT.items() if package == "transformers" else ():
        path = BUILD / name / "tests" / file
        path.parent.mkdir(exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(content)
    (BUILD / name / "tests" / "__init__.py").touch()
    return BUILD / name


def outcomes(package: str, mode: str, arguments: list[str]) -> dict[tuple[str, str], str]:
    """Runs the tests of a package in one mode; returns the outcome of each by its class and name."""
    folder, packages, report = sources(package), BUILD / f"packages-of-{package}", BUILD / f"{package}-{mode}.xml"
    if not packages.exists():
        pip("install", "--target", packages, *NEEDED[package])
    report.unlink(missing_ok=True)
    path = os.pathsep.join(map(str, (folder, HERE.parent, HERE.parents[1], packages)))
    env = {**os.environ, "PYTHONPATH": path, "LN_SCALING": mode, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    file = {"transformers": "transformers_common.py", "peft": "peft_decoders.py"}[package]
    options = ["-q", "--tb=short", "-W", "ignore", "-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={HERE}"]
    with (BUILD / f"{package}-{mode}.log").open("w") as log:
        command = [sys.executable, "-m", "pytest", *options, f"--junitxml={report}", *arguments, str(HERE / file)]
        subprocess.run(command, cwd=folder, env=env, stdout=log, stderr=log)
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        key = case.get("classname", "").rpartition(".")[2], case.get("name", "")
        found[key] = {"failure": "failed", "error": "failed"}.get(outcome, outcome)
    return found


def main() -> None:
    arguments = sys.argv[1:]
    packages = [arguments.pop(0)] if arguments and arguments[0] in NEEDED else list(NEEDED)
    BUILD.mkdir(parents=True, exist_ok=True)
    print("passed / failed / skipped\n")
    print(f"| tests | {' | '.join(MODES)} |\n|{' --- |' * (1 + len(MODES))}")
    worse = []
    for package in packages:
        by_mode = {mode: outcomes(package, mode, arguments) for mode in MODES}
        for group in dict.fromkeys(group for found in by_mode.values() for group, _ in found):
            cells = []
            for found in by_mode.values():
                counts = Counter(outcome for (name, _), outcome in found.items() if name == group)
                cells.append(" / ".join(str(counts[outcome]) for outcome in ("passed", "failed", "skipped")))
            print(f"| {package} {version(package)} {group} | {' | '.join(cells)} |")
        for key, outcome in by_mode["without"].items():
            after = [mode for mode in MODES[1:] if by_mode[mode].get(key) != outcome]
            if outcome == "passed" and after:
                worse.append(f"{'::'.join(key)}: not passed when {', '.join(after)}")
    print("\n".join(["", *worse]))
    raise SystemExit(bool(worse))


if __name__ == "__main__":
    main()
