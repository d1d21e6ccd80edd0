"""Folding: the same outputs bit for bit, in memory and on disk, and a checkpoint that any program can open."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

import tiny
from hf_lnscale import apply_ln_scaling, fold_ln_scaling, ln_scales, unfold_ln_scaling
from hf_lnscale.checkpoints.export import export, read_info
from hf_lnscale.commands.main import main
from hf_lnscale.core.norm import scale_parameter, unscale_parameter

DTYPES = [torch.float32, torch.bfloat16]


def logits(model):
    with torch.no_grad():
        return model(tiny.tokens()).logits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_fold_and_unfold_change_no_bit(family, dtype):
    model = tiny.model(family, ln_scaling=True).to(dtype)
    classes = [type(module) for module in tiny.model(family).modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = logits(model)

    assert fold_ln_scaling(model) is model
    assert torch.equal(logits(model), before)
    assert [type(module) for module in model.modules()] == classes
    assert ln_scales(model) == [1.0] * 4
    assert model.config.ln_scaling is None
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])}
    assert len(changed) == 6, changed  # two norms in each of layers 1, 2, 3; layer 0 has scale 1

    assert unfold_ln_scaling(model) is model
    assert torch.equal(logits(model), before)
    assert model.config.ln_scaling == {"exponent": 0.5, "depths": [1, 2, 3, 4]}
    assert not hasattr(model.config.get_text_config(), "ln_scaling_folded")


STOCK = """
import pathlib, sys, torch, tiny, transformers as tf
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    dtype, family = folder.name.split(":")
    model = tiny.auto_class(family).from_pretrained(folder, experts_implementation="eager", dtype=getattr(torch, dtype))
    assert type(model).__module__.startswith("transformers.")
    with torch.no_grad():
        assert torch.equal(model(tiny.tokens()).logits, torch.load(folder / "logits.pt")), folder.name
    print(folder.name)
"""


@pytest.mark.slow
def test_folded_in_stock_transformers(tmp_path, run_python):
    """Folded in memory and saved, and folded on disk: the scaled model's logits in a process without the plugin."""
    for dtype in ("float32", "bfloat16"):
        for family in tiny.FAMILIES:
            folder = tmp_path / "memory" / f"{dtype}:{family}"
            scaled = tmp_path / "scaled" / folder.name
            tiny.model(family, ln_scaling=True).to(getattr(torch, dtype)).save_pretrained(scaled)
            # Read back, since `.to` rounds the rotary frequencies and `from_pretrained` does not.
            model = tiny.auto_class(family).from_pretrained(scaled, experts_implementation="eager")
            expected = logits(model)
            fold_ln_scaling(model).save_pretrained(folder)
            torch.save(expected, folder / "logits.pt")
            disk = export(scaled, tmp_path / "disk" / folder.name, progress=False)
            assert load_file(disk / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
            if family not in tiny.COMPOSITE:  # these also save the dtype of their parts once they were reloaded
                assert (disk / "config.json").read_bytes() == (folder / "config.json").read_bytes()
            torch.save(expected, disk / "logits.pt")
    for where in ("memory", "disk"):
        assert len(run_python(STOCK, tmp_path / where, plugin=False).split()) == 2 * len(tiny.FAMILIES)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("one_plus_weight", [False, True])
def test_scale_parameter_against_float64(dtype, one_plus_weight):
    """One rounding and no more, at every depth; and the inverse finds a weight with the same product."""
    weight = torch.randn(2000, dtype=torch.float64).to(dtype)
    for depth in range(1, 100):
        scale = depth**-0.5
        exact = weight.double() * scale
        if one_plus_weight:
            exact = (1 + weight.double()) * scale - 1
        scaled = scale_parameter(weight, scale, one_plus_weight)
        assert scaled.dtype == dtype
        # From float32 on, the sum inside (s * w + s - 1) is rounded in the same precision as the result.
        summands = (weight.double() * scale).abs() + 1 if one_plus_weight and dtype.itemsize >= 4 else 0
        bound = torch.finfo(dtype).eps * (exact.abs() + summands)
        assert ((scaled.double() - exact).abs() <= bound + torch.finfo(dtype).tiny).all()
        back = unscale_parameter(scaled, scale, one_plus_weight)
        assert torch.equal(scale_parameter(back, scale, one_plus_weight), scaled)


def test_unfold_after_training_while_folded():
    model = fold_ln_scaling(tiny.model(ln_scaling=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    before = logits(model)
    torch.testing.assert_close(logits(unfold_ln_scaling(model)), before, rtol=1e-4, atol=1e-5)
    assert ln_scales(model)[3] == 0.5


def test_the_flag_on_a_folded_checkpoint_is_refused(tmp_path):
    fold_ln_scaling(tiny.model(ln_scaling=True)).save_pretrained(tmp_path)
    match = r"scale twice.*unfold_ln_scaling\(model\)"
    for attempt in (AutoModelForCausalLM, LlamaForCausalLM, AutoConfig):
        with pytest.raises(ValueError, match=match):
            attempt.from_pretrained(tmp_path, ln_scaling=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, ln_scaling=False)
    with pytest.raises(ValueError, match=match):
        apply_ln_scaling(model)
    with pytest.raises(ValueError, match="already folded"):
        fold_ln_scaling(model)
    assert ln_scales(unfold_ln_scaling(model))[3] == 0.5


def test_nothing_to_fold_or_unfold():
    with pytest.raises(ValueError, match="no active ln_scaling"):
        fold_ln_scaling(tiny.model())
    with pytest.raises(ValueError, match="nothing to unfold"):
        unfold_ln_scaling(tiny.model(ln_scaling=True))


def test_weights_that_are_not_in_memory_are_refused():
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny.config(ln_scaling=True))
    with pytest.raises(ValueError, match="layer 0 are not in memory"):
        fold_ln_scaling(model)
    assert model.config.ln_scaling


# --- export ----------------------------------------------------------------------------------------


@pytest.fixture
def scaled(tmp_path):
    model = tiny.model(ln_scaling={"depths": [1, 3, 4, 9]})
    model.save_pretrained(tmp_path / "scaled", max_shard_size="20KB")
    for name in ("tokenizer.json", "chat_template.jinja", "optimizer.pt", "trainer_state.json", "README.md"):
        (tmp_path / "scaled" / name).write_text(name)
    return tmp_path / "scaled"


@pytest.fixture
def cli(capsys, monkeypatch):
    """Runs the command line in this process and returns what it printed: stdout, or stderr where it fails."""

    def run(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["hf-lnscale", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        printed = capsys.readouterr()
        assert (left.value.code or 0) == code, printed
        return printed.err if code else printed.out

    return run


def test_export_command(scaled, tmp_path, cli):
    out = tmp_path / "new" / "plain"
    assert "wrote" in cli("export", scaled, "--out", out)
    assert {path.name for path in out.iterdir()} == {path.name for path in scaled.iterdir()} - {
        "optimizer.pt",
        "trainer_state.json",
    }
    assert (out / "chat_template.jinja").read_text() == "chat_template.jinja"
    expected = logits(AutoModelForCausalLM.from_pretrained(scaled))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), expected)
    assert json.loads((out / "config.json").read_text())["ln_scaling_folded"]["depths"] == [1, 3, 4, 9]

    # A second time: refused, and nothing touched; with --force, replaced.
    (out / "tokenizer.stale").write_text("")
    assert "exists and is not empty" in cli("export", scaled, "--out", out, code=1)
    assert (out / "tokenizer.stale").exists()
    cli("export", scaled, "--out", out, "--force")
    assert not (out / "tokenizer.stale").exists()
    assert [path.name for path in out.parent.iterdir()] == ["plain"]
    assert "already folded" in cli("export", out, "--out", tmp_path / "again", code=1)
    assert not (tmp_path / "again").exists()


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("wrong", ["holds the source", "another folder", "a file"])
def test_forced_export_replaces_nothing_but_a_checkpoint(wrong, scaled, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/text.md").write_text("years of work")
    out = {"holds the source": tmp_path, "another folder": tmp_path / "thesis", "a file": tmp_path / "thesis/text.md"}
    before = contents(tmp_path)
    with pytest.raises((ValueError, FileExistsError), match=r"must not be, contain or be inside|is not a checkpoint"):
        export(scaled, out[wrong], force=True, progress=False)
    assert contents(tmp_path) == before


def test_an_export_that_fails_at_the_last_step_leaves_what_was_there(scaled, tmp_path, monkeypatch):
    out = export(scaled, tmp_path / "out", progress=False)
    before, replace, failed = contents(tmp_path), os.replace, []

    def fails(source, target):
        if Path(target) == out and not failed:
            failed.append(source)
            raise OSError("no space left")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="no space left"):
        export(scaled, out, force=True, progress=False)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("wrong", ["itself", "inside", "plain", "no folder", "no weights", "no config"])
def test_export_refuses_and_leaves_nothing(wrong, scaled, tmp_path):
    source, out = scaled, tmp_path / "out"
    if wrong == "itself":
        out = scaled
    elif wrong == "inside":
        out = scaled / "out"
    elif wrong == "plain":
        source = tmp_path / "plain"
        tiny.model().save_pretrained(source)
    elif wrong == "no folder":
        source = tmp_path / "nowhere"
    elif wrong == "no weights":
        next(scaled.glob("*.safetensors")).unlink()
    else:
        (scaled / "config.json").unlink()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((ValueError, OSError)):
        export(source, out, force=True, progress=False)
    assert sorted(tmp_path.rglob("*")) == before


def test_norms_that_are_missing_on_disk_are_noticed(scaled, tmp_path):
    index = scaled / "model.safetensors.index.json"
    files = json.loads(index.read_text())
    first = files["weight_map"]["model.layers.0.input_layernorm.weight"]
    files["weight_map"] = {k: v for k, v in files["weight_map"].items() if v != first}
    index.write_text(json.dumps(files))
    with pytest.raises(ValueError, match="should have 8"):
        export(scaled, tmp_path / "out", progress=False)


@pytest.mark.slow
def test_a_killed_export_leaves_nothing_that_loads(scaled, tmp_path):
    """Killed while the weights are being written: slowed down so that the moment is met."""
    code = """
import signal, sys, time, hf_lnscale.checkpoints.export as e
signal.signal(signal.SIGINT, signal.default_int_handler)  # where this runs in the background, it is ignored
copy = e.shutil.copyfileobj
def slow(source, target, length):
    copy(source, target, length)
    target.flush()
    print("writing", flush=True)
    time.sleep(120)
e.shutil.copyfileobj = slow
e.export(sys.argv[1], sys.argv[2], progress=False)
"""
    outs = {sent: tmp_path / sent.name / "out" for sent in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)}
    processes = {
        sent: subprocess.Popen(
            [sys.executable, "-c", code, str(scaled), str(out)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        for sent, out in outs.items()
    }
    for sent, process in processes.items():
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(sent)
        process.wait(timeout=60)
        assert not outs[sent].exists()
        left = [path for path in outs[sent].parent.rglob("*") if path.is_file()]
        assert not any(path.name == "config.json" for path in left)
        assert bool(left) == (sent != signal.SIGINT)
        for folder in {path.parent for path in left}:
            with pytest.raises((OSError, ValueError)):
                AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.slow
def test_export_memory_is_that_of_one_norm(tmp_path):
    """Written in place: the time and the memory do not grow with a copy of the weights in Python."""
    model = tiny.model(ln_scaling=True, vocab_size=400_000)
    model.save_pretrained(tmp_path / "scaled")
    size = (tmp_path / "scaled/model.safetensors").stat().st_size
    code = f"""
import resource, hf_lnscale.checkpoints.export as e
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
e.export({str(tmp_path / "scaled")!r}, {str(tmp_path / "out")!r}, progress=False)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert size > 100e6
    assert int(done.stdout) < size / 4


# --- info ------------------------------------------------------------------------------------------


def test_info(scaled, tmp_path, cli):
    shown = cli("info", scaled)
    for word in ("llama", "layers   4", "active", "0.5774", "0.3333"):
        assert word in shown
    found = json.loads(cli("info", scaled, "--json"))
    assert found["scales"] == pytest.approx([1, 3**-0.5, 0.5, 1 / 3])
    assert found["active"] == {"exponent": 0.5, "depths": [1, 3, 4, 9]}
    assert found["folded"] is None

    export(scaled, tmp_path / "folded", progress=False)
    folded = read_info(str(tmp_path / "folded"))
    assert folded["active"] is None
    assert folded["folded"] == found["active"]
    assert folded["scales"] == [1.0] * 4
    assert "folded into the weights" in cli("info", tmp_path / "folded")

    tiny.model().save_pretrained(tmp_path / "plain")
    assert "no LayerNorm Scaling" in cli("info", tmp_path / "plain")
    assert cli("info", tmp_path / "nowhere", code=1).count("\n") == 1
