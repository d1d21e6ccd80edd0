"""Runs models that were exported as DeciLM in llama.cpp, and compares every token with transformers'.

    python tests/compat/deci_with_llama_cpp.py --converter PATH_OF_LLAMA_CPP

llama.cpp is that of the wheel xllamacpp, in an environment of its own. The folders are those that serving.py gives to
vLLM, and the expected tokens too. llama.cpp's converter takes tokenizers of two kinds alone for DeciLM; as only token
ids are compared, each model gets one of Llama 2's kind in place of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from serving import DECI, NEW_TOKENS, PROMPT, Report, deci_case, deci_smollm2
from tokenizers import Tokenizer, decoders, models
from versions import BUILD, run

from hf_lnscale.checkpoints.gguf import find_converter
from hf_lnscale.core.processes import run_script

XLLAMACPP = "2026.10.11549"
# In the environment of llama.cpp: the greedy tokens of each file and their log probabilities.
RUN = """
import json, sys, xllamacpp
prompt, length, files = json.load(sys.stdin)
for file in files:
    options = xllamacpp.CommonParams()
    options.model.path, options.n_ctx, options.n_parallel = file, 256, 1
    options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    options.cpuparams.n_threads = 1
    options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds to float16
    options.warmup = False
    said = xllamacpp.Server(options).handle_completions({
        "prompt": prompt, "max_tokens": length, "temperature": 0.0, "logprobs": 1, "ignore_eos": True,
    })
    found = said["choices"][0]["logprobs"]["content"]
    print("RESULT", json.dumps({"tokens": [one["id"] for one in found], "logprobs": [one["logprob"] for one in found]}))
"""


def install(home: Path, log: Path) -> None:
    if not (home / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        wanted = ["--only-binary", ":all:", f"xllamacpp=={XLLAMACPP}"]
        if run(log, home / "bin" / "python", "-m", "pip", "install", "--no-input", *wanted):
            raise SystemExit(f"installing llama.cpp failed, see {log}")


def stand_in(folder: Path) -> None:
    """A tokenizer of Llama 2's kind, with as many tokens as the model has."""
    config = json.loads((folder / "config.json").read_text())
    names = [f"<0x{byte:02X}>" for byte in range(256)] + [f"t{i}" for i in range(config["vocab_size"])]
    vocabulary = {name: at for at, name in enumerate(names[-config["vocab_size"] :])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    for file in folder.glob("*token*"):
        file.unlink()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def convert(converter: Path, folder: Path) -> tuple[str, str]:
    """The GGUF file of the folder's `deci`, and what the converter said last."""
    stand_in(folder / "deci")
    done = run_script(converter, folder / "deci", "--outfile", folder / "x.gguf", "--outtype", "f32")
    return str(folder / "x.gguf"), (done.stderr + done.stdout).strip().splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--converter", help="llama.cpp's folder; else LLAMA_CPP and PATH")
    converter = find_converter(parser.parse_args().converter)
    BUILD.mkdir(parents=True, exist_ok=True)
    home, log = BUILD / "llama.cpp", BUILD / "llama.cpp.log"
    install(home, log)
    report = Report()
    with TemporaryDirectory() as name:
        work, want, files = Path(name), {}, {}
        for one, (family, attention, mlp, scaled, sizes) in DECI.items():
            without = [layer for layer in mlp if layer in attention]  # those that are not there at all
            want[one] = deci_case(work / one, family, attention, without, scaled, **sizes)
            files[one] = convert(converter, work / one)[0]
        want["SmolLM2-135M"] = deci_smollm2(work / "SmolLM2-135M")
        files["SmolLM2-135M"] = convert(converter, work / "SmolLM2-135M")[0]
        deci_case(work / "no MLP", "llama", [3], [1], False)
        error = convert(converter, work / "no MLP")[1]
        control = "control: the missing key added; against the model without that layer's attention too"
        want[control] = deci_case(work / "no layer", "llama", [1, 3], [1], False)
        config = json.loads((work / "no MLP/deci/config.json").read_text())
        config["block_configs"][1]["ffn"]["ffn_mult"] = None
        (work / "no MLP/deci/config.json").write_text(json.dumps(config))
        files[control] = convert(converter, work / "no MLP")[0]
        said = json.dumps([PROMPT, NEW_TOKENS, list(files.values())])
        done = subprocess.run([home / "bin" / "python", "-c", RUN], input=said, capture_output=True, text=True)
        log.write_text(done.stdout + done.stderr)
        found: list[Any] = [json.loads(one[7:]) for one in done.stdout.splitlines() if one.startswith("RESULT ")]
        for one, got in zip(files, found, strict=True):
            report.compare(one, got, want[one])
        report.refused("llama without an MLP, by the converter", {"error": error}, "'ffn_mult'")
    raise SystemExit(not report.right)


if __name__ == "__main__":
    main()
