"""Trains with axolotl and the DepthPlugin, on a CPU, and compares what it saved with formulas and plain models.

    make axolotl-test
    make axolotl-test ARGS="--environment DIR"   # an environment that is there already is used as it is

A tiny Llama is pre-trained with a warmup of the scale and depth statistics; then fine-tuned on conversations without
one of its layers, in full and with LoRA; the result is exported.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from versions import BUILD, ROOT, run

import hf_lnscale
from hf_lnscale.checkpoints.export import export, read_info
from hf_lnscale.checkpoints.zeros import export_zeros
from hf_lnscale.measuring import sample

sys.path.insert(0, str(ROOT / "tests"))
import oracles

AXOLOTL, TORCH = "0.19.0", "2.13.0"
LAYERS = 4
NORMS = ("input_layernorm", "post_attention_layernorm")
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
COMMON: dict[str, Any] = {
    "plugins": ["hf_lnscale.integrations.axolotl.DepthPlugin"],
    "sequence_len": 128,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_steps": 10,
    "optimizer": "adamw_torch",
    "lr_scheduler": "cosine",
    "learning_rate": 0.001,
    "attn_implementation": "eager",
    "bf16": False,
    "fp16": False,
    "tf32": False,
    "logging_steps": 1,
    "saves_per_epoch": 1,
    "special_tokens": {"pad_token": sample.END_OF_TEXT},
}


def install(home: Path, log: Path) -> None:
    """axolotl, torch first: the build for a CPU is chosen once."""
    if (home / "bin" / "axolotl").exists():
        return
    subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
    pip = [home / "bin" / "python", "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    for wanted in ([f"torch=={TORCH}"], [f"axolotl=={AXOLOTL}"], ["--no-deps", "--editable", ROOT]):
        if run(log, *pip, *wanted):
            raise SystemExit(f"installing {wanted} failed, see {log}")


def train(home: Path, log: Path, folder: Path, name: str, **changes: Any) -> Path:
    """Runs `axolotl train` and returns the folder that it wrote."""
    out = folder / name
    settings = COMMON | {"output_dir": str(out), "dataset_prepared_path": str(folder / f"{name}-data")} | changes
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    command = [home / "bin" / "axolotl", "train", folder / f"{name}.yaml", "--launcher", "python"]
    with log.open("a") as file:
        done = subprocess.run(command, stdout=file, stderr=file, cwd=folder, env=os.environ | ENVIRONMENT)
    if done.returncode:
        raise SystemExit(f"axolotl train {name} left with {done.returncode}, see {log}")
    return out


def require_scaled(loaded: Any, weights: dict[str, torch.Tensor], depths: list[int], tokens: torch.Tensor) -> None:
    """Compares a model with a plain one that has these weights, and forward hooks on its norms."""
    plain = LlamaForCausalLM(tiny_config(len(depths)))
    plain.load_state_dict({name: value.float() for name, value in weights.items()})
    hooked = oracles.with_hooked_norms(plain, NORMS, [depth**-0.5 for depth in depths])
    with torch.no_grad():
        got, want, without = (model.eval()(tokens).logits for model in (loaded.float(), hooked, plain))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert (want - without).abs().max() > 1e-2, "the scale makes no difference"


def tiny_config(layers: int = LAYERS) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        max_position_embeddings=256, eos_token_id=0, bos_token_id=0, pad_token_id=0, initializer_range=0.1,
    )  # fmt: skip


def prepare(folder: Path) -> None:
    """A base model with a tokenizer, text, and conversations."""
    texts = sample.documents(standard_library=False)[:40]
    tokenizer = sample.train_tokenizer(texts, 512)
    tokenizer.bos_token = tokenizer.eos_token
    LlamaForCausalLM(tiny_config()).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    lines = {"text.jsonl": [{"text": text} for text in texts], "chats.jsonl": sample.conversations()[:100]}
    for name, rows in lines.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--environment", type=Path, default=BUILD / "axolotl-cpu", help="made if it is not there")
    args = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    home, log = args.environment.resolve(), BUILD / "axolotl.log"
    log.unlink(missing_ok=True)
    install(home, log)
    with TemporaryDirectory() as name:
        check(home, log, Path(name))


def check(home: Path, log: Path, folder: Path) -> None:
    prepare(folder)
    tokens = torch.randint(512, (2, 16), generator=torch.Generator().manual_seed(0))

    text = {"path": "json", "data_files": str(folder / "text.jsonl"), "type": "pretrain", "split": "train"}
    trained = train(
        home, log, folder, "pretrained", base_model=str(folder / "base"), reinit_weights=True,
        pretraining_dataset=[text], ln_scaling={"warmup_steps": 4}, depth_stats_steps=5,
    )  # fmt: skip
    active = read_info(str(trained))["active"]
    assert active is not None
    assert (active["step"], active["depths"]) == (4, [1, 2, 3, 4]), active
    weights = load_file(trained / "model.safetensors")
    require_scaled(AutoModelForCausalLM.from_pretrained(trained), weights, [1, 2, 3, 4], tokens)
    state = json.loads(next(trained.glob("checkpoint-*/trainer_state.json")).read_text())
    measured = [entry["step"] for entry in state["log_history"] if "depth/residual_variance/layer_03" in entry]
    assert measured == [1, 5, 10], measured
    print("pre-training, a warmup of 4 steps, depth statistics: saved, reloaded", flush=True)

    chats = {
        "base_model": str(trained),
        "datasets": [{"path": str(folder / "chats.jsonl"), "ds_type": "json", "type": "chat_template"}],
        "chat_template": "chatml",
    }
    tuned = train(home, log, folder, "tuned", drop_layers=[2], **chats)
    assert read_info(str(tuned))["dropped"]["layers"] == [2]
    weights = load_file(tuned / "model.safetensors")
    require_scaled(AutoModelForCausalLM.from_pretrained(tuned), weights, [1, 2, 4], tokens)
    print("SFT without layer 2: saved, reloaded", flush=True)

    partial = train(home, log, folder, "partial", drop_layers=[0], drop_attention=[1], drop_mlp=[3], **chats)
    gone = read_info(str(partial))["dropped"]
    assert (gone["layers"], gone["attention"], gone["mlp"]) == ([0], [1], [3]), gone
    loaded = AutoModelForCausalLM.from_pretrained(partial)
    filled = load_file(export_zeros(partial, folder / "zeros") / "model.safetensors")
    hooked = LlamaForCausalLM(tiny_config(3))
    hooked.load_state_dict({name: value.float() for name, value in filled.items()})
    with torch.no_grad():
        torch.testing.assert_close(loaded.float()(tokens).logits, hooked(tokens).logits, rtol=1e-4, atol=1e-4)
    print("SFT without layer 0, attention of layer 1, MLP of layer 3: saved, reloaded", flush=True)

    folded = export(tuned, folder / "folded", progress=False)
    require_scaled(AutoModelForCausalLM.from_pretrained(folded), weights, [1, 2, 4], tokens)
    print("exported: the same outputs", flush=True)

    lora = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "v_proj"]}
    adapter = train(home, log, folder, "adapter", drop_layers=[2], **chats, **lora)
    merged = AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload()
    weights = {name: value.clone() for name, value in merged.state_dict().items()}
    require_scaled(merged, weights, [1, 2, 4], tokens)
    assert hf_lnscale.ln_scales(merged) == [1.0, 2**-0.5, 0.5]
    print("LoRA without layer 2: its base comes back", flush=True)


if __name__ == "__main__":
    main()
