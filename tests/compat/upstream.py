"""Runs transformers' and PEFT's own tests over models of ours, and prints a table of what passed.

    make compat                                          # both, every family: hours
    make compat ARGS="transformers --only llama gemma2"  # these families; the table shows what was run before, too
    make compat ARGS="--minutes 60"                      # what fits; the same command goes on from there
    make compat TRANSFORMERS=../transformers             # a checkout of the installed version in place of its sdist

Each test is run without the plugin, with the plugin imported, with LayerNorm Scaling in the configuration, and in the
middle of a warmup; those that pass without the plugin, and do not otherwise, are named. Families that cannot be scaled
are run in the first two ways. What has been run is kept in build/compat/, and run again with --again alone. The tests
come from the source distributions of the installed versions. That of transformers holds only the files tests/test_*.py:
the tests of generation and of export, which its model tests inherit, are in a checkout alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import transformers as tf
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto import modeling_auto as auto

from hf_lnscale.core.errors import UnsupportedArchitectureError
from hf_lnscale.core.families import FAMILIES, Family, family_of

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build" / "compat" / "upstream"
sys.path.insert(0, str(HERE.parent))
import kinds  # noqa: E402

import tiny  # noqa: E402

MODES = ("without", "imported", "scaled", "warmup")
NEEDED = {"transformers": ["parameterized"], "peft": ["diffusers", "importlib_metadata", "zipp"]}
FILES = {"transformers": "transformers_common.py", "peft": "peft_decoders.py"}
# PEFT's tests in groups by the model that stands in a test's name: pytest collects all of them for each group.
MODELS = {
    "Llama": "tiny-random-Llama",
    "Qwen2": "tiny-dummy-qwen2",
    "Gemma3": "tiny-random-Gemma3",
    "Mistral": "tiny-random-Mistral",
    "GPT2": "tiny-random-GPT2",
    "OPT": "tiny-random-OPT",
    "GPTJ": "tiny-random-GPTJ",
    "others": "not tiny-",
}
# What test_modeling_common.py and test_configuration_common.py import, and the source distribution does not hold.
LEFT_OUT = {
    "exporters/test_export.py": "class ExportTesterMixin: pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin: pass\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
}
HEADS = (
    auto.MODEL_MAPPING,
    auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
)
# The order of running; the others follow as the table has them, and what cannot be scaled last.
FIRST = (
    "llama qwen2 qwen3 mistral gemma gemma2 gemma3_text phi3 mixtral qwen2_moe qwen3_moe deepseek_v2 deepseek_v3 "
    "gpt_oss glm glm4 granite starcoder2 gpt2 opt bloom stablelm smollm3 qwen2_vl_text qwen3_vl_text gemma3 mistral3 "
    "llama4 olmoe qwen3_next qwen3_5_text gemma4_text"
)
# Models with a text decoder of the table inside, besides those of tests/tiny.py: its kind, and the vision part.
COMPOSITE: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3_text", {"mm_tokens_per_image": 4, "boi_token_index": 91, "eoi_token_index": 92}),
    "mistral3": ("mistral", {"vision_config": {"model_type": "pixtral", "head_dim": 8}}),
    "llama4": (
        "llama4_text",
        {"vision_config": {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}},
    ),
}
AT_ONCE = 20  # families in one process
# Why a test does not pass with LayerNorm Scaling on, where it should not.
REFUSED = {"test_lora_layer_replication": "`layer_replication` is refused on a scaled base, with what to do instead"}


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


def row(family: str) -> Family:
    return FAMILIES[COMPOSITE[family][0] if family in COMPOSITE else family]


def families() -> dict[str, tuple[tf.PreTrainedConfig, list[str]]]:
    """A tiny configuration and the classes of models of each family that the installed release has."""
    found: dict[str, tuple[tf.PreTrainedConfig, list[str]]] = {}
    text_kinds = kinds.text_kinds()
    names = dict.fromkeys([*FIRST.split(), *COMPOSITE, *FAMILIES])
    for family in sorted(names, key=lambda name: bool(row(name).no_scaling)):
        classes: list[type] = []
        if family in COMPOSITE:
            text, others = COMPOSITE[family]
            parts = {"text_config": kinds.config(text).to_dict(), "image_token_index": 90}
            vision = kinds.VISION | others.get("vision_config", {})
            config = tf.CONFIG_MAPPING[family](**(others | parts | {"vision_config": vision}))
        elif family in tiny.FAMILIES:
            config = tiny.config(family)
        elif kind := next((kind for kind in (family, *text_kinds) if text_kinds.get(kind) == family), ""):
            config = kinds.config(kind)
            classes = [kinds.model_class(kind)]
        else:
            continue
        heads = [head[type(config)] for head in HEADS if type(config) in head]
        if "text_config" in config.sub_configs:  # some classes take the configuration of the text decoder alone
            heads = [cls for cls in heads if cls.config_class is type(config)]
        # Of the kinds that are only a part of another model, one class alone takes the configuration.
        found[family] = config, [cls.__name__ for cls in dict.fromkeys(heads or classes)]
    return found


def composites() -> Iterator[str]:
    """The kinds whose configuration has that of a text decoder which can be scaled as its `text_config`."""
    for kind, config_class in tf.CONFIG_MAPPING.items():
        with suppress(UnsupportedArchitectureError, StrictDataclassError):
            if "text_config" in config_class.sub_configs and family_of(config_class()):
                yield kind


def write_configs(folder: Path) -> list[str]:
    """Writes what transformers_common.py reads, which may run without the plugin; returns the families."""
    folder.mkdir(exist_ok=True)
    classes = {}
    for family, (config, names) in families().items():
        config.to_json_file(folder / f"{family}.json", use_diff=False)
        classes[family] = [type(config).__name__, dict(row(family).requires), *names]
    (folder / "classes.json").write_text(json.dumps(classes))
    (folder / "composite.json").write_text(json.dumps(list(composites())))
    return list(classes)


def selection(package: str, group: str) -> list[str]:
    """What pytest is asked to run for a group of tests."""
    file = str(HERE / FILES[package])
    return [f"{file}::Test_{group}"] if package == "transformers" else [file, "-k", MODELS[group]]


def report(package: str, group: str, mode: str) -> Path:
    return BUILD / f"{package}-{version(package)}-{group}-{mode}.xml"


def run(package: str, mode: str, groups: list[str], folder: Path) -> None:
    """Runs the tests of these groups in one process, which writes a report of each."""
    path = os.pathsep.join(map(str, (folder, HERE.parent, HERE.parents[1], BUILD / f"packages-of-{package}")))
    env = {**os.environ, "PYTHONPATH": path, "LN_SCALING": mode, "LN_CONFIGS": str(BUILD / "configs")}
    env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    options = ["-q", "--tb=short", "-W", "ignore", "-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={HERE}"]
    for group in groups:
        report(package, group, mode).unlink(missing_ok=True)
    while groups:
        arguments = [[str(report(package, group, mode)), *options, *selection(package, group)] for group in groups]
        with (BUILD / f"{package}-{mode}.log").open("a") as log:
            command = [sys.executable, str(HERE / "one_process.py")]
            lines = "\n".join(map(json.dumps, arguments))
            subprocess.run(command, cwd=folder, env=env, input=lines, text=True, stdout=log, stderr=log)
        # The first without a report has brought the process down, if any has.
        groups = [group for group in groups if not report(package, group, mode).exists()][1:]


def outcomes(path: Path) -> dict[str, tuple[int, int]]:
    """Of each test of a report, passed (0), skipped (1) or failed (2), and how many of its sub-tests failed."""
    found = {}
    for case in ElementTree.parse(path).iter("testcase"):
        failures = sum(child.tag in ("failure", "error") for child in case)
        found[case.get("name", "")] = (2 if failures else int(case.find("skipped") is not None), failures)
    return found


def table(package: str, reports: dict[str, tuple[str, ...]]) -> list[str]:
    """Prints what each family, or model, has passed and what is left; returns what passes without the plugin alone.

    Families with the same numbers share a line; one with other numbers in other modes has several.

    `reports` has the groups of tests and the modes in which each of them is run.
    """
    rows: dict[str, dict[str, Counter[int]]] = {}
    worse, left, refused = [], [], set()
    for group, modes in reports.items():
        by_mode = {mode: outcomes(path) for mode in modes if (path := report(package, group, mode)).exists()}
        if missing := [mode for mode in modes if mode not in by_mode]:
            left.append(group if len(missing) == len(modes) else f"{group} ({', '.join(missing)})")
        for mode, found in by_mode.items():
            for test, (outcome, _) in found.items():
                model = re.search(r"/tiny-(?:\w+-)?(\w+)", test) if package == "peft" else None
                name = (model[1] if model else "other tests") if package == "peft" else group
                rows.setdefault(name, {mode: Counter() for mode in MODES})[mode][outcome] += 1
        for test, before in by_mode.get("without", {}).items():
            after = [mode for mode, found in by_mode.items() if found.get(test, (2, 0)) > before]
            if after and test in REFUSED and "imported" not in after:
                refused.add(test)
            elif after:
                worse.append(f"{group}::{test}: not as without the plugin when {', '.join(after)}")
    lines: dict[tuple[str, str], list[str]] = {}
    for name, by_mode_of in rows.items():
        cells: dict[str, list[str]] = {}
        for mode, counts in by_mode_of.items():
            if counts:
                cells.setdefault(" / ".join(str(counts[at]) for at in (0, 2, 1)), []).append(mode)
        for cell, ran in cells.items():
            lines.setdefault((cell, ", ".join(ran)), []).append(name)
    for (cell, ran_in), names in lines.items():
        print(f"| {', '.join(names)} | {cell} | {ran_in} |")
    for test in sorted(refused):
        print(f"\n{test}: {REFUSED[test]}")
    if left:
        print(f"\nnot run: {', '.join(left)}")
    return worse


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help=f"of {', '.join(NEEDED)}; both by default")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"families, or of PEFT's {', '.join(MODELS)}")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing more after this time")
    parser.add_argument("--again", action="store_true", help="also what has been run before")
    args = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    until, worse = time.monotonic() + 60 * args.minutes, []
    for package in args.packages or NEEDED:
        folder = sources(package)
        if not (packages := BUILD / f"packages-of-{package}").exists():
            pip("install", "--target", packages, *NEEDED[package])
        if package == "transformers":
            reports = {name: MODES[:2] if row(name).no_scaling else MODES for name in write_configs(BUILD / "configs")}
            reports["composite_configs"] = MODES
        else:
            reports = dict.fromkeys(MODELS, MODES)
        names = [name for name in reports if not args.only or name in args.only]
        for start in range(0, len(names), AT_ONCE):
            for mode in args.modes:
                groups = [name for name in names[start : start + AT_ONCE] if mode in reports[name]]
                if not args.again:
                    groups = [name for name in groups if not report(package, name, mode).exists()]
                if groups and time.monotonic() < until:
                    run(package, mode, groups, folder)
        print(f"{package} {version(package)}\n")
        print(
            f"| {'families' if package == 'transformers' else 'models'} | passed / failed / skipped | in these modes |"
        )
        print("| --- | --- | --- |")
        worse += table(package, reports)
    print("\n".join(["", *worse]))
    raise SystemExit(bool(worse))


if __name__ == "__main__":
    main()
