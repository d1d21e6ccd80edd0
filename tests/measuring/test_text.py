"""Texts and token ids as batches: what a user may hand over, and what is said where it cannot be read."""

import csv
import gzip
import json
import os
import threading

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import tiny
from hf_lnscale import diagnose, plan_pruning
from hf_lnscale.evaluation import perplexity
from hf_lnscale.measuring import sample
from hf_lnscale.measuring.text import Windows, documents, parse_sources, require_file, token_batches
from hf_lnscale.measuring.text_files import read_rows

BOS, EOS = 1, 2


def tokenizer(bos=False):
    """Words w3, w4, ... as tokens 3, 4, ...; with `bos`, one that puts <s> in front, as Llama's does."""
    vocabulary = {"<unk>": 0, "<s>": BOS, "</s>": EOS} | {f"w{i}": i for i in range(3, tiny.VOCAB)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", BOS)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def words(*ids):
    return " ".join(f"w{i}" for i in ids)


def rows_of(batches):
    return [row for batch in batches for row in batch.input_ids.tolist()]


def test_windows_of_text():
    found = token_batches(
        [words(3, 4, 5), words(6, 7)], tokenizer=tokenizer(), windows=Windows(seq_len=3, batch_size=1)
    )
    assert rows_of(found) == [[3, 4, 5], [EOS, 6, 7]]


def test_windows_begin_as_the_tokenizer_begins_a_text():
    texts = [words(3, 4, 5), words(6, 7)]
    found = token_batches(texts, tokenizer=tokenizer(bos=True), windows=Windows(seq_len=4, batch_size=1))
    assert rows_of(found) == [[BOS, 3, 4, 5], [BOS, EOS, 6, 7]]
    assert found.num_tokens == 8
    assert rows_of(token_batches(texts, tokenizer=tokenizer(bos=True), windows=Windows(num_tokens=6, seq_len=3))) == [
        [BOS, 3, 4],
        [BOS, 5, EOS],
    ]
    # As many tokens again give the same windows again.
    part, _ = token_batches(
        [words(*range(3, 40))], tokenizer=tokenizer(bos=True), windows=Windows(num_tokens=32, seq_len=4)
    ).split(0.25)
    again = token_batches(
        [words(*range(3, 40))], tokenizer=tokenizer(bos=True), windows=Windows(num_tokens=part.num_tokens, seq_len=4)
    )
    assert part.describe()["sha256"] == again.describe()["sha256"]


def test_a_chat_that_begins_with_the_token_has_it_once():
    chats = tokenizer(bos=True)
    chats.chat_template = "<s> {{ messages[0]['content'] }}"
    rows = [{"messages": [{"role": "user", "content": words(3, 4)}]}]
    assert rows_of(token_batches(rows, tokenizer=chats)) == [[BOS, 3, 4]]


def test_a_chat_is_measured_with_the_token_once():
    chats = tokenizer(bos=True)
    chats.chat_template = "<s> {{ messages[0]['content'] }}"
    rows = [{"messages": [{"role": "user", "content": words(3, 4)}]}]
    model = tiny.model()
    found = perplexity(model, rows, chats, seq_len=8, progress=False)
    with torch.no_grad():
        logits = model(torch.tensor([[BOS, 3, 4]])).logits[0, :-1].double()
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([3, 4]), reduction="sum").item()
    assert (found.num_tokens, found.num_bytes) == (2, len(f" {words(3, 4)}"))
    assert found.nats == pytest.approx(expected, rel=1e-6)


def test_windows_are_no_longer_than_the_positions_of_the_model():
    text, model = [words(*[3, 4, 5, 6] * 200)], tiny.model(max_position_embeddings=32)
    assert len(rows_of(token_batches(text, model, tokenizer=tokenizer()))[0]) == 32
    assert len(rows_of(token_batches(text, tiny.model(max_position_embeddings=700), tokenizer=tokenizer()))[0]) == 512
    assert len(rows_of(token_batches(text, tokenizer=tokenizer()))[0]) == 512
    for measure in (diagnose, plan_pruning):
        given = {"num_layers": 1} if measure is plan_pruning else {"jacobian": False}
        with pytest.raises(ValueError, match=r"seq_len must be at most 32, the number of positions of .*, got 33"):
            measure(model, text, tokenizer=tokenizer(), windows=Windows(seq_len=33), progress=False, **given)


def test_empty_rows_are_no_texts():
    texts = ["", words(3, 4), "", "\n", "  ", words(5), ""]
    assert rows_of(token_batches(texts, tokenizer=tokenizer())) == [[3, 4, EOS, 5]]
    rows = [{"text": text} for text in texts]
    assert rows_of(token_batches(rows, tokenizer=tokenizer())) == [[3, 4, EOS, 5]]
    with pytest.raises(ValueError, match="list has 0 token"):
        token_batches(["", " "], tokenizer=tokenizer())
    assert documents(texts) == texts


def test_no_more_tokens_than_asked_for():
    text = [words(*[3] * 600)]
    for num_tokens, shape in ((64, (1, 64)), (512, (1, 512)), (1000, (1, 512))):
        (batch,) = token_batches(text, tokenizer=tokenizer(), windows=Windows(num_tokens=num_tokens, seq_len=512))
        assert batch.input_ids.shape == shape
    with pytest.raises(ValueError, match="num_tokens must be an integer >= 2, got 1"):
        token_batches(text, tokenizer=tokenizer(), windows=Windows(num_tokens=1))


IDS = [[5, 6, 7], [8, 9, 10]]
FORMS = {
    "tensor": torch.tensor(IDS),
    "array": np.array(IDS),
    "array of 16 bits": np.array(IDS, dtype=np.int16),
    "dict of arrays": {"input_ids": np.array(IDS)},
    "arrays": [np.array(row) for row in IDS],
    "tensors": [torch.tensor(row) for row in IDS],
    "lists": IDS,
    "lists of numpy's integers": [[np.int64(one) for one in row] for row in IDS],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_token_ids(form):
    assert rows_of(token_batches(FORMS[form])) == IDS


def test_arrays_of_texts_are_texts():
    texts = np.array([words(3, 4), words(5)])
    for form in (texts, texts.astype(object)):
        assert rows_of(token_batches(form, tokenizer=tokenizer())) == [[3, 4, EOS, 5]]


ROWS = [{"text": words(3)}, {"text": words(4)}]
FILES = {
    "pretty.json": (
        json.dumps(ROWS[0], indent=1).encode(),
        r"line 1 of 'pretty.json' is not JSON: .*; expected JSON lines",
    ),
    "array.jsonl": (json.dumps(ROWS).encode(), "line 1 of 'array.jsonl' holds a list of rows; expected JSON lines"),
    "latin.txt": ("w3 é".encode("latin-1"), "cannot read 'latin.txt': 'utf-8' codec .*byte 0xe9"),
    "latin.jsonl": ('{"text": "é"}'.encode("latin-1"), "cannot read 'latin.jsonl': 'utf-8' codec .*byte 0xe9"),
    # Behind the part of a file that is decoded at once.
    "latin.json": (
        b'["w3",\n' + b'"w3",\n' * 9000 + '"é"]'.encode("latin-1"),
        "cannot read 'latin.json': 'utf-8' codec .*byte 0xe9",
    ),
    "short.csv": (b"id,text\n1,w3\n2\n", r"column 'text' must hold strings; row 1 \(from 0\) has None"),
    "long.csv": (b"id\n1,w3\n", r"have a column 'text' or 'messages', got columns \['None', 'id'\]"),
    "other.tsv": (b"id\tbody\n1\tw3\n", r"have a column 'text' or 'messages', got columns \['body', 'id'\]"),
    "broken.txt.gz": (b"w3 w4", "cannot read 'broken.txt.gz': Not a gzipped file"),
    "broken.parquet": (b"w3 w4", "cannot read 'broken.parquet': .*[Pp]arquet"),
    "none.jsonl": (
        b'{"text": "w3"}\n{"text": null}',
        r"column 'text' must hold strings; row 1 \(from 0\) has None",
    ),
    "other.jsonl": (b'{"content": "w3"}', r"have a column 'text' or 'messages', got columns \['content'\]"),
}


READABLE = {
    "rows.jsonl": b'{"text": "w3"}\n\n{"text": "w4"}',
    "rows.json": b'\n{"text": "w3"}\n{"text": "w4"}\n',
    "array.json": json.dumps(ROWS).encode(),
    "pretty.json": json.dumps(ROWS, indent=1).encode(),
    "rows.jsonl.gz": gzip.compress(b'{"text": "w3"}\n{"text": "w4"}'),
    "rows.csv": b'id,text\n1,w3\n2,"w4"\n',
    "rows.tsv": b"text\tid\nw3\t1\nw4\t2\n",
    "bom.csv": b"\xef\xbb\xbftext\nw3\nw4\n",
    "rows.csv.gz": gzip.compress(b"text\nw3\nw4\n"),
}


@pytest.mark.parametrize("name", [*READABLE, "rows.parquet"])
def test_every_kind_of_file_of_rows(name, tmp_path):
    if name in READABLE:
        (tmp_path / name).write_bytes(READABLE[name])
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(ROWS), tmp_path / name)
    assert documents(tmp_path / name) == [words(3), words(4)]
    assert rows_of(token_batches(tmp_path / name, tokenizer=tokenizer())) == [[3, EOS, 4]]


def test_lists_of_token_ids_in_a_json_file(tmp_path):
    for name in ("ids.json", "ids.jsonl"):
        (tmp_path / name).write_text("[3, 4]\n[5, 6]\n")
        assert rows_of(token_batches(tmp_path / name)) == [[3, 4], [5, 6]]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", [name for name in READABLE if "json" in name and not name.endswith(".gz")])
def test_rows_may_come_from_a_pipe(name, tmp_path):
    os.mkfifo(tmp_path / name)
    writer = threading.Thread(target=(tmp_path / name).write_bytes, args=(READABLE[name],), daemon=True)
    writer.start()
    assert [row["text"] for _, row in read_rows(tmp_path / name, "data")] == [words(3), words(4)]
    writer.join()


def test_a_file_of_text_may_be_compressed(tmp_path):
    (tmp_path / "text.txt.gz").write_bytes(gzip.compress(words(3, 4).encode()))
    assert documents(tmp_path / "text.txt.gz") == [words(3, 4)]


def test_chats_in_a_csv_file(tmp_path):
    chat = [{"role": "user", "content": words(3)}]
    with (tmp_path / "chats.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["messages"], [json.dumps(chat)]])
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    known = tokenizer()
    known.chat_template = template
    assert documents(tmp_path / "chats.csv", known) == [words(3)]


@pytest.mark.parametrize("name", FILES)
def test_files_that_cannot_be_read_are_named(name, tmp_path):
    content, message = FILES[name]
    (tmp_path / name).write_bytes(content)
    for read in (lambda path: token_batches(path, tokenizer=tokenizer()), documents):
        with pytest.raises(ValueError, match=f"data: .*{message}"):
            read(tmp_path / name)


# --- several sources --------------------------------------------------------------------------------


def test_sources_have_names_weights_and_shares_of_the_tokens():
    data = {
        "a": [words(*[3] * 200)],
        "b": ([words(*[4] * 200)], 0.5),
        "c": ([words(*[5] * 200)], 0),
        "ids": [[6] * 4, [7] * 4, [8] * 4],
    }
    found = token_batches(data, tokenizer=tokenizer(), windows=Windows(100, 4, batch_size=3))
    assert found.weights == {"a": 1.0, "b": 0.5, "c": 0.0, "ids": 1.0}
    assert {name: found.only(name).num_tokens for name in found.weights} == {"a": 40, "b": 20, "c": 24, "ids": 12}
    for name, token in (("a", 3), ("b", 4), ("c", 5)):
        assert {batch.name for batch in found.only(name)} == {name}
        assert {one for row in rows_of(found.only(name)) for one in row} == {token}
    assert rows_of(found) == [row for name in found.weights for row in rows_of(found.only(name))]
    about = found.describe()["sources"]
    assert about["b"] == {"weight": 0.5, "num_tokens": 20, "num_sequences": 5}

    fitted, judged = found.split(0.25, whole=["c"])
    assert {name: fitted.only(name).num_sequences for name in fitted.weights} == {"a": 8, "b": 4, "ids": 2}
    assert {name: judged.only(name).num_sequences for name in judged.weights} == {"a": 2, "b": 1, "c": 6, "ids": 1}
    for name in fitted.weights:
        assert rows_of(fitted.only(name)) + rows_of(judged.only(name)) == rows_of(found.only(name))


def test_every_source_has_two_windows():
    data = {"a": [words(*[3] * 50)], "b": ([words(*[4] * 50)], 0.01)}
    found = token_batches(data, tokenizer=tokenizer(), windows=Windows(16, 8))
    assert {name: found.only(name).num_tokens for name in found.weights} == {"a": 16, "b": 16}
    short = token_batches({"a": [words(*[3] * 50)], "b": [words(4, 4)]}, tokenizer=tokenizer(), windows=Windows(16, 8))
    with pytest.raises(ValueError, match=r"data: 1 sequence\(s\) of tokens of b cannot be split"):
        short.split(0.25)


def test_wrong_sources_are_named():
    for data, message in (
        ({"a": ([words(3)], -1)}, "the weight of a must be a number >= 0, got -1"),
        ({"a": ([words(3)], float("nan"))}, "the weight of a must be a number >= 0, got nan"),
        ({"a": ([words(3)], 0)}, "at least one source must have a weight above 0"),
        ({"": [words(3)]}, "sources of text must have names, got ''"),
        ({1: [words(3)]}, "sources of text must have names, got 1"),
        ({"a": [words(3, 4)], "b": []}, r"list is empty \(source b\)"),
        ({}, "at least one source"),
    ):
        with pytest.raises(ValueError, match=f"data: {message}"):
            token_batches(data, tokenizer=tokenizer())
    with pytest.raises(FileNotFoundError, match=r"no-such\.txt"):
        require_file({"a": ([words(3)], 1), "b": ("no-such.txt", 2)})


def test_sources_on_a_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a=b.txt", "c:0.5"):
        (tmp_path / name).write_text("w3")
    cases = {
        "dir/text.txt": ("text", ("dir/text.txt", 1.0)),
        "wiki=a.txt": ("wiki", ("a.txt", 1.0)),
        "code=b.jsonl:0.5": ("code", ("b.jsonl", 0.5)),
        "b.jsonl:2": ("b", ("b.jsonl", 2.0)),
        "seen=b.jsonl:0": ("seen", ("b.jsonl", 0.0)),
        "a=b.txt": ("a=b", ("a=b.txt", 1.0)),
        "x=c:0.5": ("x", ("c:0.5", 1.0)),
        "dir=x/y=z.txt": ("dir", ("x/y=z.txt", 1.0)),
        "dir/x=y.txt": ("x=y", ("dir/x=y.txt", 1.0)),
    }
    for argument, (name, value) in cases.items():
        assert parse_sources([argument]) == {name: value}
    assert list(parse_sources(["b=1.txt", "a=2.txt"])) == ["b", "a"]
    for arguments, message in (
        (["=a.txt"], "'=a.txt' has no name before '='"),
        (["a="], "'a=' is not a source of text"),
        (["a=b.txt:-1"], "is not a source of text; use PATH, NAME=PATH or NAME=PATH:WEIGHT"),
        (["a=b.txt:inf"], "is not a source of text"),
        (["x/a.txt", "y/a.txt"], "two sources are named 'a'; rename one, for example other=y/a.txt"),
    ):
        with pytest.raises(ValueError, match=f"data: .*{message}"):
            parse_sources(arguments)


def test_a_text_in_place_of_a_path_is_refused_in_a_line():
    """Whose name is longer than a file's can be."""
    with pytest.raises(FileNotFoundError, match=r"^data: there is no file 'a text .*must be in a list"):
        token_batches("a text " * 1000)
    with pytest.raises(FileNotFoundError) as refused:
        token_batches({"wiki": "a text " * 1000})
    assert len(str(refused.value)) < 500


def test_a_list_of_paths_is_refused(tmp_path):
    """Otherwise the names of the files would be taken for texts."""
    path = tmp_path / "part.txt"
    path.write_text("a text " * 1000)
    with pytest.raises(
        ValueError, match=r"data: a list must contain texts, but its first entry is the path '.*part\.txt'; name"
    ):
        token_batches([str(path)] * 60, tokenizer=sample.train_tokenizer(["a text"] * 9, 300))
