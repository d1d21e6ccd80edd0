"""The wheel, in an environment with torch, transformers and nothing else; the two commands on a fresh machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
EXTRAS = {"trl", "peft", "accelerate", "datasets", "lm-eval", "matplotlib", "gguf", "pytest"}


def run(*command: object, cwd: Path, fails: bool = False, **environment: str) -> str:
    """Runs a command without what this process's environment says to Python and make; returns what it printed."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "MAKE"))}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, cwd=cwd, env={**inherited, **environment}
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stderr if fails else done.stdout


def with_requirements(*names: str) -> set[str]:
    """The names of these installed distributions and of all that they require, extras left out."""
    found: set[tuple[str, str]] = set()
    queue = [(name, "") for name in names]
    while queue:
        name, extra = queue.pop()
        if (name, extra) in found:
            continue
        found.add((name, extra))
        for requirement in map(Requirement, metadata.requires(name) or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                queue += [(canonicalize_name(requirement.name), part) for part in ("", *requirement.extras)]
    return {name for name, _ in found}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources, as setuptools leaves its traces beside them."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for package in ("hf_lnscale", "recipes", "tests"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index")
    run(*pip, "--wheel-dir", folder, source, cwd=folder)
    return next(folder.glob("hf_lnscale-*.whl"))


@pytest.fixture(scope="module")
def bare_environment(wheel: Path) -> Path:
    """A virtual environment in which the wheel was installed next to torch and transformers.

    These two, and what they require, are links to the ones that run this test: installing torch again would take
    minutes. pip sees an environment that holds them and no other package, not even pip.
    """
    folder = wheel.parent / "environment"
    venv.create(folder, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    for name in with_requirements("torch", "transformers"):
        distribution = metadata.distribution(name)
        for entry in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (site / entry).exists():
                (site / entry).symlink_to(str(distribution.locate_file(entry)))
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python")
    run(*pip, "install", "--no-index", wheel, cwd=folder)
    run(*pip, "check", cwd=folder)
    return folder


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    files = [path for top in ("hf_lnscale", "recipes") for path in (ROOT / top).rglob("*") if path.is_file()]
    sources = {path.relative_to(ROOT).as_posix() for path in files if path.suffix not in (".pyc", ".md")}
    package = {name for name in names if ".dist-info/" not in name}
    # The recipes lie in the package, so that an installed command finds them.
    assert package == {f"hf_lnscale/{name}" if name.startswith("recipes/") else name for name in sources}
    assert {"hf_lnscale/py.typed", "hf_lnscale/recipes/configs/sft/qwen3-8b.yaml"} <= package
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_library_and_command_line_work_without_the_extras(bare_environment, tmp_path):
    script = """\
    import importlib.metadata
    import hf_lnscale
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, ln_scaling=True
    )
    model = LlamaForCausalLM(config)
    assert hf_lnscale.ln_scales(model) == [1.0, 2**-0.5]
    model.save_pretrained("scaled")
    again = LlamaForCausalLM.from_pretrained("scaled")
    assert hf_lnscale.ln_scales(again) == [1.0, 2**-0.5]
    hf_lnscale.fold_ln_scaling(again)
    diagnosis = hf_lnscale.diagnose(again, [list(range(12)), list(range(4, 16))], progress=False)
    assert "<svg" in diagnosis.report()
    print(hf_lnscale.__file__)
    print(*(one.metadata["Name"] for one in importlib.metadata.distributions()))
    """
    python = bare_environment / "bin" / "python"
    file, names = run(python, "-c", textwrap.dedent(script), cwd=tmp_path).splitlines()
    assert Path(file).is_relative_to(bare_environment)
    installed = {canonicalize_name(name) for name in names.split()}
    assert installed == with_requirements("torch", "transformers") | {"hf-lnscale"}
    assert not installed & EXTRAS
    command = bare_environment / "bin" / "hf-lnscale"
    assert "demo" in run(command, "--help", cwd=tmp_path)
    assert "install the extra hf-lnscale[demo]" in run(command, "demo", cwd=tmp_path, fails=True)
    assert "install the extra hf-lnscale[train]" in run(command, "train", "sft", cwd=tmp_path, fails=True)
    folder = run(command, "train", cwd=tmp_path).splitlines()[-1]
    assert (Path(folder) / "sft.py").is_file()


# --- make -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_checkout(tmp_path):
    if shutil.which("make") is None:
        pytest.skip("needs make")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_make_names_a_python_that_is_too_old(fresh_checkout):
    old = fresh_checkout / "python-old"
    old.write_text(f"#!{sys.executable}\nimport sys\nsys.version_info = (3, 8, 18)\nexec(sys.argv[2])\n")
    old.chmod(0o755)
    for goal in ("test", "demo"):
        said = run("make", goal, f"PYTHON={old}", cwd=fresh_checkout, fails=True)
        assert said.splitlines()[0] == (
            f"hf_lnscale needs Python 3.10 or newer; {old} is 3.8.18. Try: make {goal} PYTHON=/path/to/python3.11"
        )
    said = run("make", "test", "PYTHON=python-nowhere", cwd=fresh_checkout, fails=True)
    assert "python-nowhere is not found" in said.splitlines()[0]
    assert not (fresh_checkout / ".venv").exists()


@pytest.mark.slow
def test_make_names_what_could_not_be_installed(fresh_checkout):
    nothing = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
    said = run("make", "test", f"PYTHON={sys.executable}", cwd=fresh_checkout, fails=True, **nothing)
    ours = [line for line in said.splitlines() if not line.startswith("make")]
    assert len(ours) == 1
    assert ours[0].startswith("hf_lnscale: installing torch==")
    assert "build/install.log" in ours[0]
    assert (fresh_checkout / "build" / "install.log").is_file()
    assert not (fresh_checkout / ".venv" / ".installed").exists()
