"""`hf-lnscale demo`: the curse of depth, its cure, and a cut, measured in minutes on a CPU."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from ..core.display import one_line, terminal, with_error
from ..core.errors import MissingPackageError, require_packages
from ..core.json_file import to_json
from ..core.processes import run_script
from .options import quiet_transformers

FULL: dict[str, Any] = {"num_hidden_layers": 12, "hidden_size": 128, "intermediate_size": 344,
        "num_attention_heads": 4, "max_position_embeddings": 128, "vocab_size": 2048}  # fmt: skip
FAST: dict[str, Any] = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 172,
        "num_attention_heads": 4, "max_position_embeddings": 64, "vocab_size": 512}  # fmt: skip
BATCH = 8  # sequences


def demo(
    out: Annotated[Path, Option(help="Folder for models, plot and results.json.")] = Path("lnscale-demo"),
    fast: Annotated[bool, Option("--fast", help="Half a minute: smaller models, few steps.")] = False,
    seed: Annotated[int, Option(help="Seed for both training runs.")] = 0,
) -> None:
    """See the curse of depth, and the cures, in minutes.

    Measures a real model layer by layer, trains a small one with and without
    LayerNorm Scaling, ships it, and cuts a model.
    """
    require_packages("the demo", "demo", "accelerate", "matplotlib")
    Demo(out, fast, seed).run()


def split(documents: list[str]) -> tuple[list[str], list[str]]:
    """Splits documents: every tenth is for evaluation, the others are for training."""
    return [text for index, text in enumerate(documents) if index % 10], documents[::10]


class Demo:
    """The four acts. With `fast`, act 1 is skipped unless SmolLM2 has been converted, and act 4 cuts act 2's model."""

    def __init__(self, out: Path, fast: bool = False, seed: int = 0) -> None:
        from rich.console import Console

        from ..measuring.sample import documents

        self.out, self.fast, self.seed = out, fast, seed
        self.shape, self.steps, self.sequences = (FAST, 20, 16) if fast else (FULL, 140, 48)
        self.train_texts, self.held_out_texts = split(documents(standard_library=not fast))
        self.console = Console(highlight=False, soft_wrap=True)
        self.results: dict[str, Any] = {"settings": {**self.shape, "steps": self.steps, "seed": seed, "fast": fast}}

    def run(self) -> dict[str, Any]:
        """Runs the acts, prints the results, and writes results.json, demo.png and the models to `out`."""
        from ..checkpoints.folders import require_free, require_place

        require_place(self.out / "results.json", str(self.out))
        for name in ("lns-model-folded", "pruned-model"):  # written in acts 3 and 4
            require_free((self.out / name).resolve(), (), str(self.out / name), force=True)
        self.out.mkdir(parents=True, exist_ok=True)
        acts = {
            "curse: a real Pre-LN model, layer by layer": self.curse,
            "cure: a small deep Llama, trained without and with LNS": self.cure,
            "ship: an ordinary checkpoint for any runtime": self.ship,
            "drop: layers out of a trained model, chosen by measurement": self.drop,
        }
        seconds = self.results["seconds"] = {}
        with quiet_transformers(progress_bars=False):
            for number, (title, act) in enumerate(acts.items(), start=1):
                self.console.rule(f"[bold]{number}. The {title}", align="left")
                name, started = title.partition(":")[0], time.perf_counter()
                self.results[name] = act()
                seconds[name] = round(time.perf_counter() - started, 1)
        (self.out / "results.json").write_text(to_json(self.results, indent=2) + "\n", encoding="utf-8")
        self.plot(self.out / "demo.png")
        if self.fast:
            self.say("A fast run only shows that all parts work; hf-lnscale demo shows what scaling and pruning do.")
        self.say(f"Plots and all numbers are in {self.out}: demo.png, results.json. {sum(seconds.values()):.0f} s.")
        return self.results

    def say(self, text: str) -> None:
        self.console.print(one_line(text), markup=False)

    def curse(self) -> dict[str, Any]:
        """Diagnoses SmolLM2-135M, a real Pre-LN model, as `hf-lnscale diagnose` does."""
        from ..checkpoints.names import load
        from ..checkpoints.smollm2 import convert_smollm2, smollm2_folder
        from ..diagnosis.examine import diagnose
        from ..measuring.text import Windows

        if not (folder := smollm2_folder()).is_dir():
            self.say("SmolLM2-135M is converted to a transformers checkpoint once by hf-lnscale demo (half a minute).")
            if self.fast:
                return {"skipped": True}
            try:
                convert_smollm2()
            except MissingPackageError as error:
                self.say(f"Skipped: {error}")
                return {"skipped": True}
        windows = Windows(512 if self.fast else 2048, 256)
        found = diagnose(load(folder), self.held_out_texts, windows=windows, loss=False, jacobian=False, progress=False)
        self.console.print(str(found), markup=False)
        names = ("variance", "variance_without_first", "variance_error", "variance_without_first_error")
        variances = {key: [place[key] for place in found.residual] for key in names}
        return {"skipped": False, "checkpoint": str(folder), **variances}

    def cure(self) -> dict[str, Any]:
        """Trains a Pre-LN and an LNS model from the same weights on the same data, and saves the latter."""
        from ..diagnosis.examine import diagnose
        from ..measuring.sample import train_tokenizer
        from ..measuring.text import Windows, token_batches

        tokenizer = train_tokenizer(self.train_texts, self.shape["vocab_size"])
        length = self.shape["max_position_embeddings"]
        train, held_out = (
            token_batches(texts, tokenizer=tokenizer, windows=Windows(count, length, BATCH))
            for texts, count in ((self.train_texts, None), (self.held_out_texts, self.sequences * length))
        )
        about = f"{self.steps} steps of {BATCH * length} tokens of Python's documentation; one seed, a demonstration. "
        self.say(about + "± is the standard error over the held-out text alone.")
        figures: dict[str, Any] = {}
        for name, ln_scaling in {"Pre-LN": False, "LNS": True}.items():
            model = self.new_model(tokenizer.eos_token_id, ln_scaling)
            losses = self.train(model, train, held_out)
            found = diagnose(model, held_out, jacobian=False, progress=False)
            figures[name] = {
                "evaluation_losses": losses,
                "evaluation_loss_error": (found.baseline or {}).get("loss_error"),
                "residual_variance": [place["variance"] for place in found.residual],
                "residual_variance_error": [place["variance_error"] for place in found.residual],
                "loss_added": found.values("loss_added"),
                "loss_added_error": found.values("loss_added_error"),
            }
        model.cpu().save_pretrained(self.out / "lns-model")
        tokenizer.save_pretrained(self.out / "lns-model")

        def row(title: str, key: str, at: int, sign: str = "") -> tuple[str, ...]:
            return title, *(with_error(one[key][at], one[f"{key}_error"][at], sign) for one in figures.values())

        layers = range(len(found.layers))
        final = [with_error(one["evaluation_losses"][-1], one["evaluation_loss_error"]) for one in figures.values()]
        rows: list[tuple[str, ...]] = [
            ("evaluation loss, nats per token", *final),
            row("residual variance after layer 0", "residual_variance", 1),
            row(f"residual variance after layer {layers[-1]}", "residual_variance", -1),
            *(row(f"loss added without layer {layer}", "loss_added", layer, "+") for layer in layers),
        ]
        self.console.print(terminal(("", *figures), rows))
        return figures

    def new_model(self, end: int, ln_scaling: bool) -> Any:
        """A Llama with random weights that depend only on the seed, not on `ln_scaling`."""
        from transformers import LlamaConfig, LlamaForCausalLM, set_seed

        set_seed(self.seed)
        config = self.shape | {"eos_token_id": end, "bos_token_id": end, "ln_scaling": ln_scaling}
        return LlamaForCausalLM(LlamaConfig(**config))

    def train(self, model: Any, *parts: Any) -> list[float]:
        """Trains a model in place with a small version of the paper's recipe; returns the evaluation losses."""
        from transformers import PrinterCallback, Trainer, TrainingArguments

        arguments = TrainingArguments(
            output_dir=str(self.out), max_steps=self.steps, seed=self.seed, per_device_train_batch_size=BATCH,
            learning_rate=1e-3, lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.1},
            warmup_steps=self.steps // 10, adam_beta2=0.95, eval_strategy="steps", eval_steps=self.steps // 5,
            logging_strategy="no", save_strategy="no", report_to="none", dataloader_pin_memory=False,
            disable_tqdm=not sys.stderr.isatty(),
        )  # fmt: skip
        rows = [[{"input_ids": row, "labels": row} for batch in part for row in batch.input_ids] for part in parts]
        trainer = Trainer(model, arguments, train_dataset=rows[0], eval_dataset=rows[1])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]

    def ship(self) -> dict[str, Any]:
        """Exports the LNS model and runs it in a process without this package."""
        import torch

        from ..checkpoints.export import export
        from ..checkpoints.folders import scratch_folder
        from ..checkpoints.names import load

        scaled = self.out / "lns-model"
        folded = export(scaled, self.out / "lns-model-folded", force=True, progress=False)
        expected = load(scaled)(torch.arange(50)[None]).logits.detach()
        with scratch_folder(self.out.resolve() / "plain") as scratch:
            script, logits = scratch / "plain.py", scratch / "logits.pt"
            script.write_text(PLAIN_PROCESS)
            done = run_script(script, scaled, folded, logits, torch.get_num_threads())
            if done.returncode:
                raise RuntimeError(f"the process without the plugin failed:\n{done.stderr}")
            found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
            found["largest_difference"] = (torch.load(logits) - expected).abs().max().item()
        self.say(f"{folded}, without hf_lnscale: the logits differ by at most {found['largest_difference']:g}.")
        for name, error in found["refusals"].items():
            self.say(f"{scaled}, by {name} without hf_lnscale: {error or 'NOT REFUSED'}")
        return found

    def drop(self) -> dict[str, Any]:
        """Drops two layers from SmolLM2-135M, or one from the LNS model, and heals it, as `hf-lnscale prune` does."""
        from ..measuring.text import Windows
        from ..pruning.prune import prune

        real = None if self.fast else self.results["curse"].get("checkpoint")
        found = prune(
            real or str(self.out / "lns-model"), self.held_out_texts, out=self.out / "pruned-model", force=True,
            num_layers=2 if real else 1, method="block_influence", heal="linear", prompt_tokens=256, new_tokens=16,
            windows=Windows(4096, 256) if real else Windows(1024, 64), progress=False,
        )  # fmt: skip
        self.console.print(str(found), markup=False)
        self.say("Chosen by Block Influence (ShortGPT) in one pass; hf-lnscale prune chooses better, in minutes.")
        cut = found.plan
        return {"layers": list(cut.layers), "perplexity": cut.perplexity, "errors": cut.errors, "model": cut.model_name}

    def plot(self, path: Path) -> None:
        """Plots the curse, and growth, evaluation loss and contribution of layers of both small models."""
        from matplotlib.figure import Figure

        curse, cure = self.results["curse"], self.results["cure"]
        real = {"variance": "variance", "without the first token": "variance_without_first"}

        def lines_of(key: str, error: str) -> dict[str, Any]:
            return {name: (one[key], one[error]) for name, one in cure.items()}

        panels = {
            "SmolLM2-135M: residual variance before layer": {} if curse["skipped"] else {
                label: (curse[key], curse[f"{key}_error"]) for label, key in real.items()
            },
            "From scratch: residual variance before layer": lines_of("residual_variance", "residual_variance_error"),
            "From scratch: evaluation loss over the run": lines_of("evaluation_losses", "evaluation_loss_error"),
            "From scratch: loss added by removing a layer": lines_of("loss_added", "loss_added_error"),
        }  # fmt: skip
        figure = Figure(figsize=(11, 7.5), layout="constrained")
        for axis, (title, lines) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
            for label, (values, errors) in lines.items():
                axis.errorbar(range(len(values)), values, errors, marker="o", ms=4, label=label)
            axis.set_title(title, loc="left")
            axis.locator_params(axis="x", integer=True)
            axis.set_yscale("log" if "before layer" in title else "linear")
            if lines:
                axis.legend(frameon=False)
        figure.savefig(path, dpi=150)


# Run in a separate Python process that imports only transformers.
PLAIN_PROCESS = """
import json, sys, torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
scaled, folded, logits = sys.argv[1:4]
torch.set_num_threads(int(sys.argv[4]))  # affects the order of sums and thus the last bit
torch.save(AutoModelForCausalLM.from_pretrained(folded)(torch.arange(50)[None]).logits.detach(), logits)
refusals = {}
for model_class in (AutoModelForCausalLM, LlamaForCausalLM):
    try:
        refusals[model_class.__name__] = model_class.from_pretrained(scaled) and ""
    except Exception as error:
        refusals[model_class.__name__] = str(error).splitlines()[0]
print(json.dumps({"refusals": refusals, "plugin_imported": "hf_lnscale" in sys.modules}))
"""
