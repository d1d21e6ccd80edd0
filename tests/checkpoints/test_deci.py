"""DeciLM by a reference of what vLLM and llama.cpp compute; what they were run on is in docs/serving.md."""

import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
import transformers as tf
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedConfig

import tiny
from hf_lnscale import drop_layers
from hf_lnscale.checkpoints.deci import _described, export_deci
from hf_lnscale.commands.main import main
from hf_lnscale.core.errors import CheckpointError, UnsupportedArchitectureError

SIZES = {"intermediate_size": 256}
CASES = {
    "llama": ("llama", {}, [1, 3], [0]),
    "every bias": ("llama", {"attention_bias": True, "mlp_bias": True}, [2], [1, 3]),
    "scaled, layer 1 gone": ("llama", {"ln_scaling": True}, [1, 2], [1, 3]),
    "tied": ("llama", {"tie_word_embeddings": True}, [3], []),
    "mistral": ("mistral", {"sliding_window": None}, [1, 2], [3]),
    "qwen2": ("qwen2", {}, [2], [1, 3]),
    "mistral, biases it ignores": (
        "mistral", {"sliding_window": None, "attention_bias": True, "mlp_bias": True}, [1], []
    ),
    "qwen2, biases it ignores": ("qwen2", {"attention_bias": True, "mlp_bias": True}, [2], [1]),
    "llama 3's rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
            }
        },
        [1],
        [],
    ),
}  # fmt: skip


def cut_model(family="llama", attention=(1,), mlp=(), **changes):
    model = tiny.loud(family, **(SIZES | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero in a new model
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    return drop_layers(model, attention=attention, mlp=mlp)


@pytest.fixture
def partial(tmp_path):
    cut_model(attention=[1], mlp=[2]).save_pretrained(tmp_path / "partial")
    return tmp_path / "partial"


def mlp_size(ffn, hidden):
    """As both programs compute it."""
    size = int(2 * ffn["ffn_mult"] * hidden / 3)
    return size if size % 256 == 0 else size + 256 - size % 256


def frequencies(rope, size):
    found = 1 / rope["rope_theta"] ** (torch.arange(0, size, 2).double() / size)
    if rope["rope_type"] == "default":
        return found
    slowed = []
    for one in found:
        turns = rope["original_max_position_embeddings"] * one / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        part = ((turns - low) / (high - low)).clamp(0, 1)
        slowed.append(part * one + (1 - part) * one / rope["factor"])
    return torch.stack(slowed)


def decilm(folder, ids):
    """The logits of DeciLM, from the files alone."""
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    heads, hidden, eps = config["num_attention_heads"], config["hidden_size"], config["rms_norm_eps"]
    size = config["head_dim"]

    def norm(x, name):
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weights.pop(f"{name}.weight")

    def linear(x, name, bias, rows):
        weight = weights.pop(f"{name}.weight")
        assert weight.shape == (rows, x.shape[-1])
        return F.linear(x, weight, weights.pop(f"{name}.bias") if bias else None)

    angles_TR = torch.arange(ids.shape[1])[:, None] * frequencies(config["rope_parameters"], size)

    def rotate(x):
        a, b = x.chunk(2, -1)
        return torch.cat([a * angles_TR.cos() - b * angles_TR.sin(), b * angles_TR.cos() + a * angles_TR.sin()], -1)

    embedding = weights.pop("model.embed_tokens.weight")
    x = embedding[ids]
    assert len(config["block_configs"]) == config["num_hidden_layers"]
    for at, block in enumerate(config["block_configs"]):
        layer = f"model.layers.{at}"
        if not block["attention"]["no_op"]:
            y, path = norm(x, f"{layer}.input_layernorm"), f"{layer}.self_attn"
            groups = heads // block["attention"]["n_heads_in_group"]
            q, k, v = (
                linear(y, f"{path}.{name}_proj", config["qkv_bias"], count * size).unflatten(-1, (count, size))
                for name, count in (("q", heads), ("k", groups), ("v", groups))
            )
            q, k, v = rotate(q.transpose(1, 2)), rotate(k.transpose(1, 2)), v.transpose(1, 2)
            k, v = (one.repeat_interleave(heads // groups, 1) for one in (k, v))
            seen = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            x = x + linear(seen, f"{path}.o_proj", config["attention_bias"], hidden)
        if not block["ffn"]["no_op"]:
            y, bias = norm(x, f"{layer}.post_attention_layernorm"), config["mlp_bias"]
            inner = mlp_size(block["ffn"], hidden)
            gate, up = (linear(y, f"{layer}.mlp.{name}_proj", bias, inner) for name in ("gate", "up"))
            x = x + linear(F.silu(gate) * up, f"{layer}.mlp.down_proj", bias, hidden)
    x = norm(x, "model.norm")
    logits = x @ (embedding if config["tie_word_embeddings"] else weights.pop("lm_head.weight")).T
    assert not weights
    return logits


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_computes_the_same(case, tmp_path):
    family, changes, attention, mlp = CASES[case]
    cut = cut_model(family, attention, mlp, **changes)
    cut.save_pretrained(tmp_path / "partial")
    assert export_deci(tmp_path / "partial", tmp_path / "deci", progress=False) == tmp_path / "deci"
    got, want = decilm(tmp_path / "deci", tiny.tokens()), cut(tiny.tokens()).logits
    assert (got - want).abs().max() < 1e-5 * want.std()  # norms and rotation of transformers are in float32


def test_the_configuration_that_both_programs_read(tmp_path):
    """By name: the keys that vLLM and llama.cpp's converter look up."""
    cut_model("qwen2", [2], [1, 3], ln_scaling=True).save_pretrained(tmp_path / "partial")
    export_deci(tmp_path / "partial", tmp_path / "deci", progress=False)
    config = json.loads((tmp_path / "deci/config.json").read_text())
    assert config["architectures"] == ["DeciLMForCausalLM"]
    assert config["model_type"] == "nemotron-nas"
    here = {"no_op": False, "replace_with_linear": False}
    attention, none = here | {"n_heads_in_group": 2}, {"no_op": True, "replace_with_linear": False}
    mlp = here | {"ffn_mult": 12.0}
    assert config["block_configs"] == [
        {"attention": attention, "ffn": mlp},
        {"attention": attention, "ffn": none},
        {"attention": none | {"n_heads_in_group": None}, "ffn": mlp},
        {"attention": attention, "ffn": none},
    ]
    assert (config["qkv_bias"], config["attention_bias"], config["mlp_bias"]) == (True, False, False)
    assert not {"layer_types", "sliding_window", "_name_or_path", "ln_scaling", "dropped_layers"} & set(config)
    assert config["ln_scaling_folded"]
    assert str(tmp_path) not in json.dumps(config)


@pytest.mark.slow
def test_every_size_comes_back():
    for hidden in range(64, 8193, 704):
        for size in range(256, 5 * hidden, 256):
            config = tf.LlamaConfig(
                hidden_size=hidden, intermediate_size=size, num_attention_heads=8, num_key_value_heads=2,
                num_hidden_layers=2, drop_attention=[1], architectures=["LlamaForCausalLM"],
            )  # fmt: skip
            found = _described(config, config.to_dict(), "x")["block_configs"][0]["ffn"]
            assert mlp_size(found, hidden) == size


def test_the_size_of_a_head_that_qwen2_does_not_name():
    config = tf.Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_attention_heads=14, num_key_value_heads=2, num_hidden_layers=2,
        drop_attention=[1], architectures=["Qwen2ForCausalLM"],
    )  # fmt: skip
    assert "head_dim" not in config.to_dict()
    assert _described(config, config.to_dict(), "x")["head_dim"] == 64


READ = """
import sys, transformers as tf
try:
    tf.LlamaForCausalLM.from_pretrained(sys.argv[1])
except Exception as error:
    assert "'intermediate_size' expected int, got NoneType" in str(error), error
else:
    raise SystemExit("taken for a Llama")
config = tf.AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
assert isinstance(config, tf.LlamaConfig) and config.model_type == "nemotron-nas"
assert [block.attention.no_op for block in config.block_configs] == [False, True, False, False]
assert [hasattr(block.ffn, "ffn_mult") for block in config.block_configs] == [True, True, False, True]
config.save_pretrained("copy")
"""


@pytest.mark.slow
@pytest.mark.parametrize("plugin", [False, True])
def test_its_configuration_is_read_by_transformers(plugin, partial, tmp_path, run_python):
    export_deci(partial, tmp_path / "deci", progress=False)
    run_python(READ, tmp_path / "deci", plugin=plugin)
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("deci", "copy"))
    assert after["block_configs"] == before["block_configs"]


REFUSED = {
    "another family": ("qwen3", {}, "not qwen3"),
    "norms of another kind": ("gemma", {}, "not gemma"),
    "experts": ("mixtral", {}, "not mixtral"),
    "size": ("llama", {"intermediate_size": 320}, "the size of its MLPs, 320, is not a multiple of 256"),
    "heads": ("llama", {"head_dim": 16}, "the size of its heads is not hidden_size / num_attention_heads"),
    "groups": ("llama", {"num_key_value_heads": 3}, "not a multiple of num_key_value_heads"),
    "activation": ("llama", {"hidden_act": "gelu"}, "its MLPs use gelu, not silu"),
    "window": ("mistral", {"sliding_window": 8}, "sliding window"),
    "windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 4}, "sliding window"),
    "rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        "rotary embedding is linear",
    ),
    "part of a head": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "only part of each head",
    ),
    "first layer": ("llama", {"drop_attention": [0, 1]}, "its first layer has no attention"),
    "first layer left": ("llama", {"drop_layers": [0], "drop_attention": [1]}, "its first layer has no attention"),
    "no language model": ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "is for causal language"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_a_weight_is_read(case, tmp_path):
    """There is none to read."""
    family, changes, reason = REFUSED[case]
    given = SIZES | {"drop_attention": [1], "architectures": ["LlamaForCausalLM"]} | changes
    tiny.config(family, **given).save_pretrained(tmp_path / "partial")
    with pytest.raises(UnsupportedArchitectureError, match=reason) as caught:
        export_deci(tmp_path / "partial", tmp_path / "out", progress=False)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["partial"]


def test_a_model_that_lacks_nothing_is_refused(tmp_path):
    for name, model in {"plain": tiny.model(**SIZES), "cut": drop_layers(tiny.model(**SIZES), [1])}.items():
        model.save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match="needs no --format deci: all its layers have attention and MLP"):
            export_deci(tmp_path / name, tmp_path / "out", progress=False)


def more(weights):
    return weights | {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}


def fewer(weights):
    return {name: tensor for name, tensor in weights.items() if name != "model.layers.3.mlp.up_proj.weight"}


def other(weights):
    return weights | {"model.layers.3.mlp.up_proj.weight": torch.ones(128, tiny.HIDDEN)}


@pytest.mark.parametrize("change", [more, fewer, other])
def test_tensors_that_its_configuration_does_not_ask_for(change, partial, tmp_path):
    save_file(change(load_file(partial / "model.safetensors")), partial / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"does not have the tensors of DeciLM, see .*(q_norm|up_proj)"):
        export_deci(partial, tmp_path / "out", progress=False)
    assert os.listdir(tmp_path) == ["partial"]


def test_sharded_and_replaced(tmp_path):
    cut = cut_model(attention=[1], mlp=[2])
    cut.save_pretrained(tmp_path / "partial", max_shard_size="50KB")
    for force in (False, True):
        export_deci(tmp_path / "partial", tmp_path / "deci", force=force, progress=False)
    weights = [load_file(file) for file in (tmp_path / "deci").glob("*.safetensors")]
    assert len(weights) > 2
    held = {name: tensor for part in weights for name, tensor in part.items()}
    assert held.keys() == cut.state_dict().keys()
    assert all(torch.equal(held[name], tensor) for name, tensor in cut.state_dict().items())
    assert json.loads((tmp_path / "deci/model.safetensors.index.json").read_text())["weight_map"].keys() == held.keys()


KILLED = """
import os, signal, sys, hf_lnscale.checkpoints.deci as deci
def killed(*words, **options):
    os.kill(os.getpid(), signal.SIGKILL)
deci.safe_open = killed  # all is written, and about to be verified
deci.export_deci(sys.argv[1], sys.argv[2], progress=False)
"""


@pytest.mark.slow
def test_a_killed_export_leaves_nothing(partial, tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, partial, tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "out").exists()
    assert len(os.listdir(tmp_path)) == 2
    export_deci(partial, tmp_path / "out", progress=False)
    assert sorted(os.listdir(tmp_path)) == ["out", "partial"]


@pytest.fixture
def cli(capsys, monkeypatch):
    """Runs the command line in this process and returns what it printed to stdout."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hf-lnscale", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        assert not left.value.code
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize(("mlp", "said"), [([], "for llama.cpp, if"), ([2], "not for llama.cpp, which also drops")])
def test_the_verb_says_who_reads_it(mlp, said, tmp_path, cli):
    cut_model(attention=[1], mlp=mlp).save_pretrained(tmp_path / "partial")
    out = cli("export", tmp_path / "partial", "--format", "deci", "--out", tmp_path / "out")
    assert f"wrote {tmp_path / 'out'}: DeciLM, for vLLM with --trust-remote-code; " in out
    assert said in out


def test_no_class_of_transformers_takes_it(partial, tmp_path):
    export_deci(partial, tmp_path / "deci", progress=False)
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "deci", trust_remote_code=True)
    PreTrainedConfig.from_pretrained(tmp_path / "deci")  # as AutoTokenizer does where remote code is refused
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoConfig.from_pretrained(tmp_path / "deci", trust_remote_code=False)
    with pytest.raises(StrictDataclassFieldValidationError, match="'intermediate_size' expected int, got NoneType"):
        LlamaForCausalLM.from_pretrained(tmp_path / "deci")
