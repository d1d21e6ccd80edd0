from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

TESTS = Path(__file__).parent
# Tests that fail by what other projects' releases do themselves, with or without the plugin: a pattern of their names,
# the releases, and what is the matter. One that passes there is an error: its row has to go.
THEIRS = [
    (
        r"test_compile_without|test_compile_notices|test_compiled_layer_by_layer|kernel_bound_to_the_norms\[compiled|"
        r"test_nothing_is_compiled_anew|test_a_compiled_model",
        "torch<2.7 transformers<5.17",
        "compiling a Llama",
    ),
    (
        r"test_composition.*test_lora\[(qwen3_next|deepseek_v3)",
        "peft<0.20",
        "target_modules='all-linear' in MoE models",
    ),
    (r"test_layers.*test_offloaded_to_disk", "accelerate<1.15", "offloading a whole model to disk"),
    (
        r"test_verbs_take_a_folder_with_a_gguf",
        "gguf;python_version<'3.11'",
        "transformers does not find gguf's release",
    ),
    (r"test_hf_finds_the_command", "huggingface-hub<1.6", "hf runs extensions that are one script"),
    (r"test_trl_sft", "trl<1.15", "trl's scripts drop model_init_kwargs"),
    (r"the_probe_finds\[git\]", "transformers<5.17", "a cache gives a random GIT other outputs"),
    (r"own_beyond_a_sliding_window", "transformers<5.18", "the end of assisted generation"),
    (r"test_an_adapter_that_transformers_holds", "transformers>=5.24 peft<0.22", "add_adapter asks for PEFT 0.22"),
]

# Two test workers on two cores: more threads than that only get in each other's way.
torch.set_num_threads(1)


def installed(requirement: str) -> bool:
    one = Requirement(requirement)
    with suppress(PackageNotFoundError):
        fits = one.specifier.contains(version(one.name), prereleases=True)
        return fits and (one.marker is None or one.marker.evaluate())
    return False


def pytest_collection_modifyitems(items):
    for pattern, releases, reason in THEIRS:
        if all(map(installed, releases.split())):
            for item in items:
                if re.search(pattern, item.nodeid):
                    item.add_marker(pytest.mark.xfail(reason=f"{releases}: {reason}", strict=True))


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)


@pytest.fixture
def quick_recipes(tmp_path, monkeypatch):
    """Recipes draw no plots, and their data is cached for the test alone."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("hf_lnscale.training.run_report._plot", lambda *told: [])


@pytest.fixture
def run_python(tmp_path):
    """Runs Python code in a new process and returns what it printed.

    Without the plugin, the code runs in a process that has never imported it, which is checked at its end.
    """

    def run(code: str, *args: object, plugin: bool, expect_failure: bool = False) -> str:
        check = "import sys; assert ('hf_lnscale' in sys.modules) == " + repr(plugin)
        path = os.pathsep.join([str(TESTS), str(TESTS.parent)])  # this very checkout, whichever is installed
        script = "\n".join(["import hf_lnscale" if plugin else "", textwrap.dedent(code), check])
        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, args)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        if expect_failure:
            assert done.returncode != 0, done.stdout
            return done.stderr
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
