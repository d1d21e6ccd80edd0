"""Text that needs no download: English and code that come with every Python, and text that a model writes itself.

Also questions with answers, and a tokenizer trained on the spot, so that the demo and each recipe run without data.
"""

from __future__ import annotations

import ast
import functools
import itertools
import random
import sys
import sysconfig
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from .known_text import passages, sequences_of
from .stream import kv_cache
from .text import TokenBatches, Windows, token_batches

END_OF_TEXT = "<|endoftext|>"
# Weight of each default source added to data of one source. On SmolLM2 this doubled what healing gained on kinds
# of text never given, and cost under 1 % on the given one (docs/results.md, healing and the text it was fitted on).
DEFAULT_WEIGHT = 0.25


def documents(standard_library: bool = True) -> list[str]:
    """English that comes with every Python: the topics of the language reference, and each module's docstrings.

    No paragraph occurs twice: the topics contain one another, and many docstrings are copies.
    """
    from pydoc_data.topics import topics

    documents = [topics[name] for name in sorted(topics)]
    if standard_library:
        documents += ("\n\n".join(docstring for _, docstring in found) for _, found, _ in _modules())
    first: dict[str, tuple[int, str]] = {}  # words of a paragraph -> its first document, and itself
    for at, document in enumerate(documents):
        for paragraph in document.split("\n\n"):
            first.setdefault(" ".join(paragraph.split()), (at, paragraph.strip("\n")))
    first.pop("", None)
    unique = itertools.groupby(first.values(), key=lambda found: found[0])
    return ["\n\n".join(paragraph for _, paragraph in found) for _, found in unique]


def source_code() -> list[str]:
    """The source of each public module of the standard library, without its docstrings."""
    return [code for _, _, code in _modules()]


def default_sources(
    model: Any = None, tokenizer: Any = None, own_tokens: int = 0, seq_len: int = 512
) -> dict[str, Any]:
    """Sources of text for everyone: "english" and "python" from the standard library, and "own" by the model itself.

    The arguments are for "own" alone, which is left out without `own_tokens`; see `own_text`.
    """
    sources: dict[str, Any] = dict(_standard_library())
    if own_tokens:
        sources["own"] = own_text(model, tokenizer, own_tokens, seq_len)
    return sources


def with_default_sources(
    fitted: TokenBatches, judged: TokenBatches, tokenizer: Any
) -> tuple[TokenBatches, TokenBatches]:
    """Adds `default_sources` to data of one source: a fit to one kind of text alone may do harm on others.

    Each is fitted with weight `DEFAULT_WEIGHT` and half as many windows as the data, and judged on others, half as many
    as are judged of the data, but 2 to 8. All are as long as the longest of the data. One that shares passages with the
    judged data, as Python's documentation would, is judged and not fitted: the data would not be held out any more.
    """
    ((name, weight),), (judged_name,) = fitted.weights.items(), judged.weights
    seq_len = max(2, *(batch.input_ids.shape[1] for batch in judged))
    to_fit, to_judge = max(fitted.num_sequences // 2, 1), min(max(judged.num_sequences // 2, 2), 8)
    windows = Windows((to_fit + to_judge) * seq_len, seq_len, len(judged.batches[0].input_ids))
    sources, judged_sources = {name: (fitted, weight)}, {judged_name: (judged, 1.0)}
    for other, texts in default_sources().items():
        batches = token_batches(texts, tokenizer=tokenizer, windows=windows)
        first, last = batches.split(to_judge / (to_fit + to_judge))
        other = other if other not in (name, judged_name) else f"default {other}"
        first.source = last.source = other
        shared = torch.isin(passages(sequences_of(first)), passages(sequences_of(judged))).sum()
        if shared <= 1:  # one may be by chance
            sources[other] = first, DEFAULT_WEIGHT * weight
        judged_sources[other] = last, 0.0
    return TokenBatches.join(sources), TokenBatches.join(judged_sources)


def first_token(tokenizer: Any) -> int:
    """The token that a model's own text begins with: the one that begins a text, or, if there is none, ends one."""
    for found in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if found is not None:
            return int(found)
    raise ValueError("tokenizer: it has no bos_token and no eos_token for the model's own text to begin with")


@torch.no_grad()
def own_text(
    model: Any, tokenizer: Any, num_tokens: int, seq_len: int = 512, batch_size: int = 16, seed: int = 0
) -> list[torch.Tensor]:
    """Text that a model writes, sampled at temperature 1 after the token that begins a text, or, if there is none, ends
    one: batches of token ids, shape (B, T). Dropout must be off.

    Costs a pass of the model for each of `seq_len` tokens, with the cache, for each batch: on a CPU about five times as
    long as reading as many tokens. The same seed gives the same text on the same machine.
    """
    first = first_token(tokenizer)
    device = model.get_input_embeddings().weight.device
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for size in torch.arange(max(1, num_tokens // seq_len)).split(batch_size):
        ids_BT = torch.full((len(size), 1), first)
        cache: dict[str, Any] = {}
        while ids_BT.shape[1] < seq_len:
            output = model(input_ids=ids_BT[:, -1:].to(device), **cache, use_cache=True)
            cache = kv_cache(output)
            p_BV = output.logits[:, -1].float().softmax(-1).cpu()
            ids_BT = torch.cat([ids_BT, torch.multinomial(p_BV, 1, generator=generator)], dim=1)
        batches.append(ids_BT)
    return batches


@functools.cache
def _standard_library() -> dict[str, list[str]]:
    found = {"english": _pieces(documents()), "python": _pieces(source_code())}
    return {name: texts for name, texts in found.items() if texts}  # some installations have no source


def _pieces(texts: list[str], size: int = 2000) -> list[str]:
    """Passages of about as many characters, whole lines each, in a random order that is always the same: the first
    tokens are then from all of the texts."""
    pieces: list[str] = []
    for text in texts:
        lines, length = [], 0
        for line in text.splitlines(keepends=True):
            lines.append(line)
            length += len(line)
            if length >= size:
                pieces.append("".join(lines))
                lines, length = [], 0
        pieces.append("".join(lines))
    random.Random(0).shuffle(pieces)
    return pieces


def conversations() -> list[dict[str, list[dict[str, str]]]]:
    """Questions about the standard library, answered by its docstrings, as rows with a column `messages`."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {module}.{name}?"},
                {"role": "assistant", "content": docstring},
            ]
        }
        for module, found, _ in _modules()
        for name, docstring in found
        if name and not name.startswith("_")
    ]


_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@functools.cache
def _modules() -> list[tuple[str, list[tuple[str, str]], str]]:
    """Each public module of the standard library (no packages): name, docstrings, and its source without these.

    A docstring has a name before it, which is empty for the module's own. Nothing is imported.
    """
    modules = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if path.stem.startswith("_") or path.stem not in sys.stdlib_module_names:
            continue
        try:
            source = path.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old source warns about its escapes
                tree = ast.parse(source)
        except (SyntaxError, ValueError, OSError):
            continue
        docstrings: list[tuple[str, str]] = []
        gone: set[int] = set()
        for node in ast.walk(tree):
            if isinstance(node, _DOCUMENTED) and (docstring := ast.get_docstring(node)) is not None:
                docstrings.append((getattr(node, "name", ""), docstring))
                gone.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
        code = [line for number, line in enumerate(source.splitlines(), start=1) if number not in gone]
        modules.append((path.stem, [pair for pair in docstrings if pair[1]], "\n".join(code)))
    return modules


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)
