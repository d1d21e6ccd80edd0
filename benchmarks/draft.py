"""Whether a model decodes faster with a draft of its own layers: promised by measured acceptance and cost, and timed.

    python benchmarks/draft.py                                     # the control alone: a model with idle layers
    python benchmarks/draft.py HuggingFaceTB/SmolLM2-135M-Instruct # a checkpoint, by name or path
    python benchmarks/draft.py CHECKPOINT --dropped 4 --dropped 8 --temperature 0.7

Layers are left out one by one by `choose_draft`, on some of the prompts; the others are then answered with the draft
and without it, prompt by prompt in turn, so that a machine whose speed drifts slows both. The ratio of tokens a second
is taken for each prompt; the table has its median and quartiles: above 1.00 the draft pays. The answers must be the
same. "promised" is theorem 3.8 of arXiv 2211.17192 with the measured cost of checking several tokens at once; it
counts forward passes, and not what `generate` adds.

The control is a random Llama in which 16 of 24 layers add nothing: every token of its draft is accepted. It shows what
the machinery is worth where a model does have layers to spare.
"""

from __future__ import annotations

import statistics
import warnings
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.utils import logging

import hf_lnscale
from hf_lnscale.pruning.speculative import DraftStep, choose_draft, measure_draft

CHOOSE_BY = [
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "Explain how plants make their food from sunlight.",
    "What were the causes of the French Revolution?",
    "Give me a recipe for pancakes, step by step.",
    "Write an email to my manager and ask for a day off next Friday.",
    "Describe the water cycle to a child of ten.",
    "Which things should I think of before I buy a used bicycle?",
    "Summarize what the immune system does, in one paragraph.",
]
MEASURE_BY = [
    "Tell me how a sailing boat can move against the wind.",
    "Write a poem of eight lines about the first snow of the year.",
    "What is the difference between weather and climate?",
    "List five ways to save energy at home, with a reason for each.",
    "Explain what inflation is and who gains from it.",
    "Write a dialogue between a baker and a customer who has lost her purse.",
    "How does a refrigerator work?",
    "Give advice to somebody who has to speak in public for the first time.",
]
IDLE = list(range(4, 20))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def control() -> Any:
    """A Llama of 24 layers of which 16 add nothing to the residual stream."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_attention_heads=12,
        num_hidden_layers=24,
        vocab_size=8192,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for layer in IDLE:
            model.model.layers[layer].self_attn.o_proj.weight.zero_()
            model.model.layers[layer].mlp.down_proj.weight.zero_()
    return model.to(DEVICE, torch.bfloat16 if DEVICE == "cuda" else torch.float32)


def prompt_ids(texts: list[str], tokenizer: Any) -> list[Any]:
    if not tokenizer.chat_template:
        return [tokenizer(text, return_tensors="pt") for text in texts]
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        for text in texts
    ]


def new_table(title: str) -> Table:
    columns = "dropped", "layers", "proposed", "accepted", "tokens a check", "cost ratio", "promised"
    return Table(*columns, "measured", "quartiles", "same text", title=title)


def add(table: Table, model: Any, prompts: Any, step: DraftStep | list[int], **settings: Any) -> float:
    """One row; returns the measured speed-up."""
    got = measure_draft(model, prompts, step, **settings)
    low, _, high = statistics.quantiles(got.speedups, n=4)
    table.add_row(
        str(len(got.layers)),
        " ".join(map(str, got.layers)),
        f"{got.num_assistant_tokens} at a time",
        f"{got.acceptance:.2f}",
        f"{got.tokens_per_verification:.2f}",
        f"{got.cost_ratio:.2f}",
        f"{got.predicted:.2f}",
        f"{got.speedup:.2f}",
        f"{low:.2f} to {high:.2f}",
        "" if got.same is None else f"{got.same:.0%}",
    )
    return got.speedup


def main(
    checkpoint: Annotated[str, typer.Argument(help="Name or path of a causal language model; none: the control.")] = "",
    dropped: Annotated[list[int], typer.Option(help="Numbers of layers to leave out.")] = [1, 2, 4, 8, 12, 16],  # noqa: B006
    length: Annotated[int, typer.Option(help="Tokens in an answer.")] = 64,
    temperature: Annotated[float, typer.Option(help="0: greedy decoding.")] = 0.0,
    candidates: Annotated[int, typer.Option(help="Layers tried in each step of the search.")] = 8,
) -> None:
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    console = Console(width=140)
    hardware = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    versions = f"{hardware}, torch {torch.__version__}, hf_lnscale {hf_lnscale.__version__}"
    settings: dict[str, Any] = {"max_new_tokens": length, "temperature": temperature}

    if not checkpoint:
        model = control()
        table = new_table(f"Control: 24 layers of which 16 add nothing, answers of {length} tokens\n{versions}")
        prompts = torch.randint(1, 8192, (8, 24), generator=torch.Generator().manual_seed(0))
        for number in (number for number in dropped if number <= len(IDLE)):
            add(table, model, prompts, IDLE[:number], num_assistant_tokens=5, **settings)
        console.print(table)
        return

    # The checkpoint's own dtype on a GPU; on a CPU, the one it is fast in.
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto" if DEVICE == "cuda" else torch.float32)
    model = model.to(DEVICE).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    choice = choose_draft(
        model,
        prompt_ids(CHOOSE_BY, tokenizer),
        max_drop=min(max(dropped), model.config.get_text_config().num_hidden_layers - 1),
        num_candidates=candidates,
        **settings,
    )
    table = new_table(f"{checkpoint.rstrip('/').split('/')[-1]}, answers of {length} tokens\n{versions}")
    best = 0.0
    for step in choice.steps:
        if len(step.layers) in dropped or step.layers == choice.layers:
            best = max(best, add(table, model, prompt_ids(MEASURE_BY, tokenizer), step, **settings))
    console.print(table)
    if len(choice.steps) < max(dropped):
        print(
            f"The search ended at {len(choice.steps)} layers: with an acceptance of {choice.steps[-1].acceptance:.2f}, "
            "not even a draft of one layer could pay."
        )
    print(
        f"choose_draft: leave out layers {choice.layers} and propose {choice.num_assistant_tokens} at a time; it "
        f"promises {choice.speedup:.2f} times the speed, so it {'pays' if choice.pays else 'does not pay'}."
    )
    print(f"Measured at best {best:.2f} times the speed: {'it pays' if best > 1 else 'it does not pay'}.")


if __name__ == "__main__":
    typer.run(main)
