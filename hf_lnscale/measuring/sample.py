"""Data that comes with every Python: text to train on, questions with answers, and a tokenizer trained on the spot.

So that the demo and each recipe run as they stand, without a download.
"""

from __future__ import annotations

import ast
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def documents(standard_library: bool = True) -> list[str]:
    """English that comes with every Python: the topics of the language reference, and each module's docstrings.

    No paragraph occurs twice: the topics contain one another, and many docstrings are copies.
    """
    from pydoc_data.topics import topics

    documents = [topics[name] for name in sorted(topics)]
    if standard_library:
        documents += ("\n\n".join(docstring for _, docstring in found) for _, found in _docstrings())
    seen: set[str] = set()
    unique = []
    for document in documents:
        paragraphs = []
        for paragraph in document.split("\n\n"):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                paragraphs.append(paragraph.strip("\n"))
        if paragraphs:
            unique.append("\n\n".join(paragraphs))
    return unique


def conversations() -> list[dict[str, list[dict[str, str]]]]:
    """Questions about the standard library, answered by its docstrings, as rows with a column `messages`."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {module}.{name}?"},
                {"role": "assistant", "content": docstring},
            ]
        }
        for module, found in _docstrings()
        for name, docstring in found
        if name and not name.startswith("_")
    ]


def _docstrings() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Each public module of the standard library (no packages), with names and docstrings; none is imported.

    The name of the module itself is empty.
    """
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if path.stem.startswith("_") or path.stem not in sys.stdlib_module_names:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of old source about its escapes
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue
        nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
        found = [(getattr(node, "name", ""), ast.get_docstring(node)) for node in nodes]
        yield path.stem, [(name, docstring) for name, docstring in found if docstring]


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
