"""Do a folded and a pruned checkpoint compute the same in llama.cpp as in transformers?

    pip install llama-cpp-python sentencepiece
    python benchmarks/other_runtimes.py CHECKPOINT --converter PATH/OF/llama.cpp

Makes three GGUF files from a plain checkpoint: from a model with an active scale that computes the same as before (its
norm weights are divided by the scale), exported by `export_gguf`, which folds it; from the same model with its scale
lost, as if a converter ignored it, as a control; and from the model without some layers. Each is compared with
transformers: the greedy tokens after several prompts, and the logits at every position of the text that transformers
generated.

Also prints how the converter reacts to the checkpoint whose scale is active.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from llama_cpp import Llama
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_lnscale
from hf_lnscale.checkpoints.gguf import export_gguf, find_converter
from hf_lnscale.core.families import family_of
from hf_lnscale.core.stack import text_stack

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "def fibonacci(n):\n",
    "Once upon a time there was a",
    "The three primary colours are",
    "In 1969, the first human",
    "A list of fruits: apple, banana,",
    "Photosynthesis is the process by which",
)


@dataclass
class Agreement:
    """Figures over all prompts.

    Attributes:
        texts: prompts whose greedy continuations are identical, token for token.
        places: positions with the same most likely next token, out of `total`.
        difference: the largest difference between two logits.
        margin: the largest lead of transformers' most likely token over that of llama.cpp, where the two differ.
    """

    texts: int = 0
    places: int = 0
    total: int = 0
    difference: float = 0.0
    margin: float = 0.0


def compare(model: Any, tokenizer: Any, file: Path, new_tokens: int) -> Agreement:
    """Runs both on the same token ids."""
    # Keys and values in float32 (type 0): by default llama.cpp keeps them in float16.
    exact = {"type_k": 0, "type_v": 0, "logits_all": True, "verbose": False}
    other = Llama(str(file), n_ctx=256, n_threads=torch.get_num_threads(), **exact)
    found = Agreement()
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            written = model.generate(ids, do_sample=False, min_new_tokens=new_tokens, max_new_tokens=new_tokens)
            ours_TV = model(written).logits[0, ids.shape[1] - 1 :].float().numpy()
        other.reset()
        other.eval(written[0].tolist())
        theirs_TV = np.array(other.scores[ids.shape[1] - 1 : other.n_tokens])
        same_T = ours_TV.argmax(-1) == theirs_TV.argmax(-1)
        # The texts are identical if every next token is. The last position predicts a token after the text.
        found.texts += bool(same_T[:-1].all())
        found.places += int(same_T.sum())
        found.total += len(same_T)
        found.difference = max(found.difference, float(np.abs(ours_TV - theirs_TV).max()))
        for ours_V, theirs_V in zip(ours_TV[~same_T], theirs_TV[~same_T], strict=True):
            found.margin = max(found.margin, float(ours_V.max() - ours_V[theirs_V.argmax()]))
    return found


def compensated(checkpoint: str) -> Any:
    """The model with an active scale and its norm weights divided by it, which is nearly the same function."""
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32")
    hf_lnscale.apply_ln_scaling(model)
    norms = family_of(model.config).pre_norms
    with torch.no_grad():
        for layer, scale in zip(text_stack(model).layers, hf_lnscale.ln_scales(model), strict=True):
            for name in norms:
                layer.get_submodule(name).weight /= scale
    return model


def refusal(converter: Path, folder: Path) -> str:
    """The last line that the converter prints for a checkpoint, in a process without the plugin."""
    command = [sys.executable, str(converter), str(folder), "--outfile", str(folder / "x.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    said = (done.stderr + done.stdout).strip().splitlines()[-1]
    return f"exit code {done.returncode}: {said}"


def main(
    checkpoint: Annotated[str, typer.Argument(help="A plain Llama-like checkpoint.")],
    converter: Annotated[Path | None, typer.Option(help="Folder of llama.cpp; default: LLAMA_CPP, then PATH.")] = None,
    drop: Annotated[str, typer.Option(help="Layers to drop, separated by commas.")] = "13,14",
    outtype: Annotated[str, typer.Option(help="Data type of the weights in the GGUF files.")] = "f32",
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate for each prompt.")] = 32,
) -> None:
    script = find_converter(converter)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    dropped = [int(layer) for layer in drop.split(",")]
    rows: list[tuple[str, Agreement]] = []
    with tempfile.TemporaryDirectory() as scratch:

        def convert(model: Any, name: str) -> Path:
            folder = Path(scratch) / name
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            return export_gguf(folder, f"{folder}.gguf", converter=script, outtype=outtype, progress=False)

        scaled = compensated(checkpoint)
        file = convert(scaled, "scaled")
        said = refusal(script, Path(scratch) / "scaled")
        rows.append(("scaled, exported and so folded", compare(scaled, tokenizer, file, new_tokens)))
        lost = hf_lnscale.remove_ln_scaling(compensated(checkpoint))
        rows.append(("control: the scale lost", compare(scaled, tokenizer, convert(lost, "lost"), new_tokens)))
        del scaled, lost
        pruned = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32", drop_layers=dropped)
        name = f"without layers {', '.join(map(str, dropped))}"
        rows.append((name, compare(pruned, tokenizer, convert(pruned, "pruned"), new_tokens)))

    title = f"{Path(checkpoint).name}, GGUF {outtype}"
    table = Table(
        title, "same texts", "same next token", "largest difference of logits", "largest lead of another token"
    )
    for name, it in rows:
        texts, places = f"{it.texts} of {len(PROMPTS)}", f"{it.places} of {it.total}"
        table.add_row(name, texts, places, f"{it.difference:.2g}", f"{it.margin:.2g}")
    console = Console(width=140)
    console.print(table)
    console.print(f"{script.name} on the checkpoint with an active scale, {said}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
