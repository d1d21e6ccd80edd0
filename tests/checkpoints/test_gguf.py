"""`hf-lnscale export --format gguf`: what the converter is given, and what becomes of what it writes.

A script stands in for llama.cpp's converter, which is no Python package; if LLAMA_CPP says where the real one is, that
runs too. benchmarks/other_runtimes.py compares what llama.cpp computes.
"""

from __future__ import annotations

import os
import textwrap

import pytest
from safetensors.torch import load_file

import hf_lnscale
import tiny
from hf_lnscale.checkpoints.gguf import export_gguf, find_converter
from hf_lnscale.core.processes import environment_with_flags

# Refuses what llama.cpp's refuses, and writes what it was given.
CONVERTER = """
import argparse, json, os, pathlib, sys
parser = argparse.ArgumentParser()
parser.add_argument("model", type=pathlib.Path)
parser.add_argument("--outfile", type=pathlib.Path)
parser.add_argument("--outtype")
given = parser.parse_args()
config = json.loads((given.model / "config.json").read_text())
if config["architectures"] != ["LlamaForCausalLM"]:
    sys.exit(f"Model {config['architectures'][0]} is not supported")
assert not any(type(finder).__name__ == "_Finder" for finder in sys.meta_path)
given.outfile.write_bytes((given.model / "model.safetensors").read_bytes())
if given.outtype == "q8_0":
    sys.exit("first line\\nno such type")
"""


@pytest.fixture
def converter(tmp_path, monkeypatch):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text(CONVERTER)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    tiny.model().save_pretrained(folder / "plain")
    tiny.model(ln_scaling=True).save_pretrained(folder / "scaled")
    hf_lnscale.fold_ln_scaling(tiny.model(ln_scaling=True)).save_pretrained(folder / "folded")
    return folder


def test_no_code_of_the_current_folder_is_run(saved, converter, tmp_path, monkeypatch):
    """Neither by what starts the converter, nor by the converter, which finds the modules beside it."""
    for name in ("json", "runpy", "threading", "typer"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('code of the current folder was run')")
    (converter / "conversion.py").touch()
    (converter / "convert_hf_to_gguf.py").write_text(CONVERTER + "import conversion, runpy, threading")
    monkeypatch.chdir(tmp_path)
    assert export_gguf(saved / "plain", tmp_path / "model.gguf", converter=converter, progress=False).is_file()


@pytest.mark.parametrize(("name", "content"), [("plain", "plain"), ("folded", "folded"), ("scaled", "folded")])
def test_the_converter_gets_a_plain_checkpoint(name, content, saved, converter, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", environment_with_flags()["PYTHONPATH"])  # as under hf-lnscale run
    out = export_gguf(saved / name, tmp_path / "new" / "model.gguf", converter=converter, progress=False)
    written, expected = load_file(out), load_file(saved / content / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(written[key].equal(expected[key]) for key in expected)
    assert [file.name for file in out.parent.iterdir()] == ["model.gguf"]


def test_where_the_converter_is_looked_for(converter, tmp_path, monkeypatch):
    file = (converter / "convert_hf_to_gguf.py").resolve()
    assert find_converter(converter) == find_converter(file) == file
    with pytest.raises(FileNotFoundError, match=r"found neither by converter or LLAMA_CPP nor on PATH"):
        find_converter()
    monkeypatch.setenv("LLAMA_CPP", str(converter))
    assert find_converter() == file
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match=r"LLAMA_CPP .*none.* is not llama\.cpp's converter"):
        find_converter()
    monkeypatch.delenv("LLAMA_CPP")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", str(converter), prepend=os.pathsep)
    assert find_converter() == file


def test_a_failure_leaves_nothing(saved, converter, tmp_path):
    out = tmp_path / "out" / "model.gguf"
    with pytest.raises(RuntimeError, match=r"convert_hf_to_gguf\.py failed: no such type"):
        export_gguf(saved / "scaled", out, converter=converter, outtype="q8_0", progress=False)
    assert list(out.parent.iterdir()) == []
    out.write_text("mine")
    with pytest.raises(FileExistsError, match=r"^out '.*model\.gguf' exists$"):
        export_gguf(saved / "plain", out, converter=converter)
    with pytest.raises(RuntimeError, match="no such type"):
        export_gguf(saved / "plain", out, converter=converter, outtype="q8_0", force=True)
    assert out.read_text() == "mine"
    export_gguf(saved / "plain", out, converter=converter, force=True)
    assert out.read_bytes() == (saved / "plain" / "model.safetensors").read_bytes()


def test_refused(saved, converter, tmp_path):
    with pytest.raises(ValueError, match=r"must be a file that ends in \.gguf"):
        export_gguf(saved / "plain", tmp_path / "folder", converter=converter)
    (tmp_path / "a.gguf").touch()
    with pytest.raises(ValueError, match="is already a GGUF file"):
        export_gguf(tmp_path / "a.gguf", tmp_path / "b.gguf", converter=converter)
    # Sliding windows on some layers: which ones, a runtime may count by itself.
    seven = {"num_hidden_layers": 7}  # the sixth of them sees everything
    hf_lnscale.drop_layers(tiny.model("gemma3_text", **seven), [1]).save_pretrained(tmp_path / "gemma")
    with pytest.raises(ValueError, match=r"has dropped layers, and .* follow a pattern \(layer_types\)"):
        export_gguf(tmp_path / "gemma", tmp_path / "gemma.gguf", converter=converter)
    hf_lnscale.drop_layers(tiny.model("gemma3_text", **seven), [6]).save_pretrained(tmp_path / "gemma")
    with pytest.raises(RuntimeError, match="Gemma3ForCausalLM is not supported"):  # by the stand-in
        export_gguf(tmp_path / "gemma", tmp_path / "gemma.gguf", converter=converter)
    hf_lnscale.drop_layers(tiny.model(), [1]).save_pretrained(tmp_path / "llama")
    assert export_gguf(tmp_path / "llama", tmp_path / "llama.gguf", converter=converter).is_file()


@pytest.mark.slow
@pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="LLAMA_CPP does not say where llama.cpp's converter is")
def test_the_real_converter_refuses_an_unfolded_checkpoint(saved, run_python):
    """As docs/checkpoints.md says; in a process without the plugin, as converters are run."""
    code = """
    import subprocess, sys
    done = subprocess.run([sys.executable, *sys.argv[1:]], capture_output=True, text=True)
    assert done.returncode
    print(done.stderr)
    """
    converter = find_converter()
    assert "LNSLlamaForCausalLM is not supported" in run_python(
        textwrap.dedent(code), converter, saved / "scaled", plugin=False
    )
