"""The command line as a whole: help, errors, exit codes, completion, what a model may be."""

from __future__ import annotations

import json
import math
import sys
from importlib import metadata

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM

import hf_lnscale
import tiny
from hf_lnscale.commands import main as module

VERBS = ("demo", "info", "diagnose", "train", "evaluate", "prune", "export", "push", "run", "env")


@pytest.fixture
def cli(capsys, monkeypatch):
    """Runs `hf-lnscale` in this process; returns what it printed to stdout and to stderr."""

    def run(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["hf-lnscale", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            module.main()
        out, err = capsys.readouterr()
        assert left.value.code == code, out + err
        return out, err

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    tiny.model().save_pretrained(folder / "plain")
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0} | {f"w{i}": i for i in range(3, 96)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder / "plain")
    (folder / "text.txt").write_text(" ".join(f"w{i}" for i in tiny.tokens(1, 300)[0].tolist()))
    return folder


# --- help and completion ----------------------------------------------------------------------------------------------


def test_help(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    out, _ = cli("--help")
    assert cli("-h")[0] == out
    lines = [line.strip("│ ").split() for line in out.splitlines()]
    listed = out[out.index("Commands") :].splitlines()
    for verb in VERBS:
        # One line each: the next begins with another verb, or the box ends.
        (at,) = (i for i, line in enumerate(listed) if line.strip("│ ").split()[:1] == [verb])
        following = listed[at + 1].strip("│ ").split(" ")[0]
        assert following in VERBS or listed[at + 1].startswith("╰"), verb
    assert ["hf-lnscale", "run", "accelerate", "launch", "train.py"] in lines
    assert "Exit codes: 0 done, 1 failed, 2 unreadable command line, 130 interrupted" in out


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(cli, verb):
    out, _ = cli(verb, "--help")
    assert f"hf-lnscale {verb}" in out
    if verb in ("info", "diagnose", "evaluate", "prune", "push", "env"):
        assert "--json" in out


def test_version(cli):
    assert cli("--version")[0] == hf_lnscale.__version__ + "\n"


def test_completion(cli, monkeypatch):
    monkeypatch.setenv("_HF_LNSCALE_COMPLETE", "source_bash")
    assert "_HF_LNSCALE_COMPLETE=complete_bash" in cli()[0]
    monkeypatch.setenv("_HF_LNSCALE_COMPLETE", "complete_bash")
    for words, expected in {"hf-lnscale ev": "evaluate", "hf-lnscale prune --max": "--max-ppl-increase"}.items():
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
        assert cli()[0].split() == [expected]


# --- errors and exit codes --------------------------------------------------------------------------------------------


def test_an_error_is_a_line_and_a_hint(cli, tmp_path, monkeypatch):
    out, err = cli("info", tmp_path / "nowhere", code=1)
    assert out == ""
    first, hint = err.splitlines()
    assert first.startswith("hf-lnscale: ")
    assert str(tmp_path / "nowhere") in first
    assert hint.startswith("  hint: hf-lnscale info --help says what is valid")
    _, err = cli("info", "no-such/model", code=1)
    assert "'no-such/model'" in err
    assert "hint: a model is a folder, a .gguf file" in err


def test_debug_shows_where(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hf-lnscale", "--debug", "info", str(tmp_path / "nowhere")])
    with pytest.raises(FileNotFoundError, match="neither a folder"):
        module.main()
    cli("info", tmp_path / "nowhere", code=1)  # for that one call


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyError("name"), "hf-lnscale: KeyError: 'name'"),
        (ZeroDivisionError(), "hf-lnscale: ZeroDivisionError"),
        (RuntimeError("first\n\nsecond"), "hf-lnscale: first"),
        (torch.OutOfMemoryError("no memory"), "hf-lnscale: no memory\n  hint: a smaller --batch-size"),
    ],
    ids=str,
)
def test_errors_that_nobody_foresaw(error, message, cli, monkeypatch):
    monkeypatch.setattr("hf_lnscale.commands.environment.environment", lambda: (_ for _ in ()).throw(error))
    _, err = cli("env", code=1)
    assert err.startswith(message)
    assert len(err.splitlines()) == 2


def test_interrupted(cli, monkeypatch):
    monkeypatch.setattr(
        "hf_lnscale.commands.environment.environment", lambda: (_ for _ in ()).throw(KeyboardInterrupt())
    )
    cli("env", code=130)


@pytest.mark.parametrize(
    "arguments",
    [["nothing"], ["info"], ["info", "x", "--no"], ["export", "x", "--out", "y", "--format", "onnx"], ["run"]],
)
def test_wrong_usage(arguments, cli):
    assert cli(*arguments, code=2)[1]


def test_warnings_are_lines_too(cli, folder, tmp_path):
    import warnings

    shown = warnings.showwarning
    try:
        cli("env")
        warnings.showwarning(UserWarning("take care"), UserWarning, "file.py", 1)
        assert warnings.showwarning is not shown
    finally:
        warnings.showwarning = shown


# --- verbs ------------------------------------------------------------------------------------------------------------


def test_env(cli):
    out, _ = cli("env")
    found = json.loads(cli("env", "--json")[0])
    assert found["flags"] is True
    assert found["packages"]["torch"] == metadata.version("torch")
    assert found["packages"]["transformers"] == tf.__version__
    installed = {one.metadata["Name"].lower().replace("_", "-") for one in metadata.distributions()}
    for name, version in found["packages"].items():
        assert (version is None) == (name not in installed)
    assert f"torch            {metadata.version('torch')}" in out
    assert "flags            on" in out


def test_evaluate(cli, folder, tmp_path):
    given = (folder / "plain", folder / "plain", "--data", folder / "text.txt", "--no-speed", "--seq-len", 32)
    out, _ = cli("evaluate", *given)
    assert "perplexity" in out
    assert "±: standard error." in out
    out, err = cli("evaluate", *given, "--json", "--out", tmp_path / "found.md")
    found = json.loads(out)  # and nothing else is on stdout
    assert found["models"][1]["differences"]["perplexity"]["value"] == 0
    assert found["settings"]["data"]["stride"] == 16
    assert f"wrote {tmp_path / 'found.md'}" in err
    assert cli("evaluate", *given, "--markdown")[0].strip() == (tmp_path / "found.md").read_text().strip()


def test_export_to_gguf_without_a_converter(cli, folder, tmp_path, monkeypatch):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    _, err = cli("export", folder / "plain", "--out", tmp_path / "x.gguf", "--format", "gguf", code=1)
    assert "convert_hf_to_gguf.py, and it is not at --converter (not given), LLAMA_CPP (not given) or on PATH" in err
    assert list(tmp_path.iterdir()) == []


def test_push_dry_run(cli, folder):
    out, _ = cli("push", folder / "plain", "me/model", "--dry-run")
    assert out.startswith("me/model: ")
    assert "  model.safetensors\n" in out
    found = json.loads(cli("push", folder / "plain", "me/model", "--dry-run", "--json")[0])
    assert found["files"]["model.safetensors"] == (folder / "plain" / "model.safetensors").stat().st_size
    assert found["card"] in out


# --- a folder with a GGUF file in it ----------------------------------------------------------------------------------


def write_gguf(model, path):
    """A Llama in float32 as llama.cpp's converter would write it, with a tokenizer of letters."""
    gguf = pytest.importorskip("gguf")
    config, weights = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<unk>", "<s>", "</s>", *map(chr, range(33, 123)), "Ġ", "w1", "w2"])
    writer.add_token_merges(["w 1", "w 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    names |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for key, value in weights.items():
        part = key.removesuffix(".weight")
        if part in outer:
            writer.add_tensor(f"{outer[part]}.weight", value.numpy())
            continue
        layer, _, part = part.removeprefix("model.layers.").partition(".")
        name = names[part]
        if name in heads:  # rotary pairs side by side
            value = value.view(heads[name], 2, -1, value.shape[-1]).transpose(1, 2).reshape(value.shape)
        writer.add_tensor(f"blk.{layer}.{name}.weight", value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_verbs_take_a_folder_with_a_gguf_file(cli, folder, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(folder / "plain")
    (tmp_path / "model").mkdir()
    write_gguf(plain, tmp_path / "model" / "one.gguf")
    assert json.loads(cli("info", tmp_path / "model", "--json")[0])["num_layers"] == 4
    assert json.loads(cli("info", tmp_path / "model" / "one.gguf", "--json")[0])["model_type"] == "llama"
    given = ("--data", folder / "text.txt", "--seq-len", 64, "--no-speed", "--json")
    (found,) = json.loads(cli("evaluate", tmp_path / "model", *given)[0])["models"]
    assert found["size_on_disk"] == (tmp_path / "model" / "one.gguf").stat().st_size
    assert found["text"]["num_bytes"] == (folder / "text.txt").stat().st_size
    assert (
        "a GGUF file has no active ln_scaling" in cli("export", tmp_path / "model", "--out", tmp_path / "x", code=1)[1]
    )

    from hf_lnscale.checkpoints.names import load

    loaded = load(tmp_path / "model")
    torch.testing.assert_close(loaded(tiny.tokens()).logits, plain(tiny.tokens()).logits)
    loaded.save_pretrained(tmp_path / "saved")  # an ordinary model
    assert math.isclose(loaded.num_parameters(), plain.num_parameters())
    (tmp_path / "model" / "two.gguf").touch()
    assert "holds 2 GGUF files: one.gguf, two.gguf" in cli("info", tmp_path / "model", code=1)[1]
