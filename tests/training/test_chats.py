"""Which tokens of a chat are learned, against the text as it stands in the data files; and the files themselves."""

import csv
import gzip
import json
import re

import datasets
import pytest
import transformers
from safetensors.torch import save_file

import recipe
from hf_lnscale.training.arguments import DataArguments, RecipeConfig
from hf_lnscale.training.chats import prepare_chat
from hf_lnscale.training.recipe_data import load_conversations
from hf_lnscale.training.scripts import recipes_folder
from hf_lnscale.training.trainer import RecipeTrainer

WEATHER = {"type": "function", "function": {"name": "weather", "description": "Looks outside.", "parameters": {}}}
CALL = {"city": "Kyiv", "days": 2}


@pytest.fixture(autouse=True)
def _no_shared_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def call(arguments):
    return [{"type": "function", "id": "c1", "function": {"name": "weather", "arguments": arguments}}]


# Rows of a data file; what the assistant says in them, a call as (name, arguments).
ROWS = {
    "messages": (
        {"messages": [turn("system", "Be brief."), turn("user", "Hi?"), turn("assistant", "Yes."), turn("user", "Oh?"),
                      turn("assistant", "Well, no.\n")]},
        ["Yes.", "Well, no.\n"],
    ),
    "role and content in conversations": (
        {"conversations": [turn("user", "Hi?"), turn("assistant", "Yes.")]}, ["Yes."],
    ),
    "ShareGPT": (
        {"id": "x1", "conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi?"},
                                       {"from": "gpt", "value": "Yes, it is."}, {"from": "human", "value": "Oh?"},
                                       {"from": "gpt", "value": "42"}]},
        ["Yes, it is.", "42"],
    ),
    "ShareGPT with a call": (
        {"conversations": [{"from": "human", "value": "Rain?"},
                           {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": CALL})},
                           {"from": "observation", "value": "wet"}, {"from": "gpt", "value": "It rains."}],
         "tools": json.dumps([WEATHER])},
        [("weather", CALL), "It rains."],
    ),
    "Alpaca": ({"instruction": "Add.", "input": "1 and 2", "output": "3"}, ["3"]),
    "Alpaca without input": ({"instruction": "Say hello.", "input": "", "output": "Hello!"}, ["Hello!"]),
    "prompt and completion": ({"prompt": "1, 2,", "completion": " 3, 4"}, [" 3, 4"]),
    "prompt and completion of messages": (
        {"prompt": [turn("user", "Hi?"), turn("assistant", "Not learned."), turn("user", "Oh?")],
         "completion": [turn("assistant", "Learned.")]},
        ["Learned."],
    ),
    "parts of text": (
        {"messages": [turn("user", [{"type": "text", "text": "Hi"}, {"type": "text", "text": "?"}]),
                      turn("assistant", [{"type": "text", "text": "Yes."}])]},
        ["Yes."],
    ),
    "only a call": (
        {"messages": [turn("user", "Rain?"), turn("assistant", None, tool_calls=call(CALL))], "tools": [WEATHER]},
        [("weather", CALL)],
    ),
    "a call as OpenAI writes it": (
        {"messages": [turn("user", "Rain?"), turn("assistant", None, tool_calls=call(json.dumps(CALL))),
                      turn("tool", "wet", tool_call_id="c1"), turn("assistant", "It rains.")], "tools": [WEATHER]},
        [("weather", CALL), "It rains."],
    ),
    "words and calls": (
        {"messages": [turn("user", "Rain?"), turn("assistant", "I look.", tool_calls=call({}) + call(CALL))]},
        ["I look.", ("weather", {}), ("weather", CALL)],
    ),
}  # fmt: skip


def prepared(path, folder, tokenizer, template="chatml"):
    """What the trainer is fed with, for all rows of a file."""
    training = RecipeConfig(output_dir=str(folder / "out"), report_to="none", chat_template_path=template)
    train, held_out = load_conversations(DataArguments(dataset_name=str(path)), training.seed)
    prepare_chat(training, tokenizer, train)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    common = {"args": training, "train_dataset": train, "eval_dataset": held_out, "processing_class": tokenizer}
    return RecipeTrainer(model=model, **common)


def learned(row, tokenizer):
    """The stretches of text that are learned."""
    stretches, before = [], -100
    for label in row["labels"]:
        if label != -100 and before == -100:
            stretches.append([])
        if label != -100:
            stretches[-1].append(label)
        before = label
    return [tokenizer.decode(ids) for ids in stretches]


def said(stretches, end):
    """What the assistant says in them: texts, and calls as (name, arguments), by the common notation of calls."""
    found = []
    for stretch in stretches:
        assert stretch.endswith(end)
        for part in re.split(r"\n?(<tool_call>.*?</tool_call>)", stretch.removesuffix(end), flags=re.DOTALL):
            if part.startswith("<tool_call>"):
                one = json.loads(part.removeprefix("<tool_call>").removesuffix("</tool_call>"))
                found.append((one["name"], one["arguments"]))
            elif part:
                found.append(part)
    return found


@pytest.fixture
def folder(tmp_path):
    recipe.save_model(tmp_path / "model")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_what_the_assistant_says_is_learned_and_nothing_else(name, folder):
    row, expected = ROWS[name]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    trainer = prepared(recipe.write_rows(folder / "rows.jsonl", [row] * 12), folder, tokenizer)
    for made in (trainer.train_dataset[0], trainer.eval_dataset[0]):
        assert said(learned(made, tokenizer), tokenizer.eos_token) == expected
    whole = tokenizer.decode(trainer.train_dataset[0]["input_ids"])
    for text in ("Hi?", "Rain?", "Looks outside.", "wet", "Be brief.", "Not learned.", "Add.", "1 and 2"):
        assert (text in whole) == (text in json.dumps(row) or (text == "Hi?" and name == "parts of text")), text
    if name.startswith("ShareGPT") or "conversations" in row:
        assert "<|im_start|>user\n" in whole  # the role that a prompt has


def test_a_template_of_the_tokenizer_s_own(folder):
    """Qwen2.5's, which TRL replaces by one that marks the answers."""
    from trl import chat_template_utils

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = chat_template_utils.qwen2_5_chat_template
    row, expected = ROWS["a call as OpenAI writes it"]
    path = recipe.write_rows(folder / "rows.jsonl", [row] * 12)
    trainer = prepared(path, folder, tokenizer, template=None)
    stretches = learned(trainer.train_dataset[0], tokenizer)
    assert said(stretches, "<|im_end|>\n") == [expected[0], "\n" + expected[1]]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "disk"])
def test_calls_with_other_arguments_in_other_rows_stay_as_they_are(kind, folder):
    """A table with one type for all rows adds the keys of every call to each, null where it has none; so in tools."""
    rows = []
    for i in range(12):
        tool = {
            "type": "function",
            "function": {"name": "weather", "parameters": {"properties": {f"x{i}": {"type": "t"}}}},
        }
        messages = [turn("user", "?"), turn("assistant", "", tool_calls=call({f"x{i}": i}))]
        rows.append({"messages": messages, "tools": [tool]})
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    trainer = prepared(write(kind, folder, rows), folder, tokenizer)
    found = [*trainer.train_dataset, *trainer.eval_dataset]
    calls = [said(learned(row, tokenizer), tokenizer.eos_token) for row in found]
    assert sorted(calls, key=str) == sorted(([("weather", {f"x{i}": i})] for i in range(12)), key=str)
    assert not any("null" in tokenizer.decode(row["input_ids"]) for row in found)


def test_chatml_opens_an_answer_as_it_is_trained(folder):
    """A prompt with the opening of an answer is the beginning of the chat with that answer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = (recipes_folder() / "configs" / "chatml.jinja").read_text()
    messages = ROWS["a call as OpenAI writes it"][0]["messages"]
    for tools in (None, [WEATHER]):
        whole = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        for count in (1, 3):
            prompt = tokenizer.apply_chat_template(
                messages[:count], tools=tools, tokenize=False, add_generation_prompt=True
            )
            assert whole.startswith(prompt)
            assert prompt.endswith("<|im_start|>assistant\n")


# --- files ----------------------------------------------------------------------------------------------------------


def write(kind, folder, rows):
    """The same rows in one of the ways in which data lies on a disk; returns what to name."""
    path = folder / f"data.{kind}"
    if kind in ("disk", "dict"):
        data = datasets.Dataset.from_list(rows)
        (datasets.DatasetDict({"train": data}) if kind == "dict" else data).save_to_disk(path)
    elif kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif kind in ("csv", "tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = "\n".join(map(json.dumps, rows)) + "\n\n"
        text = json.dumps(rows, indent=1) if kind in ("json", "json.gz") else lines
        with (gzip.open if kind.endswith(".gz") else open)(path, "wt", encoding="utf-8") as file:
            file.write(text)
    return path


KINDS = ["jsonl", "jsonl.gz", "json", "json.gz", "parquet", "csv", "tsv", "disk", "dict"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file(kind, tmp_path):
    rows = [{"instruction": f'Say "{i}",\nplease.', "input": "", "output": f"{i}"} for i in range(12)]
    for streaming in (False, True):
        arguments = DataArguments(dataset_name=str(write(kind, tmp_path, rows)), dataset_streaming=streaming)
        arguments.eval_samples = 2
        train, held_out = load_conversations(arguments, seed=0)
        found = [row["messages"] for part in (train, held_out) for row in part]
        expected = [[turn("user", row["instruction"]), turn("assistant", row["output"])] for row in rows]
        assert sorted(found, key=str) == sorted(expected, key=str)
    if kind in ("parquet", "disk"):  # chats in tables
        (tmp_path / "chats").mkdir()
        path = write(kind, tmp_path / "chats", [ROWS["ShareGPT"][0]] * 12)
        train, _ = load_conversations(DataArguments(dataset_name=str(path)), seed=0)
        roles = [message["role"] for message in train[0]["messages"]]
        assert roles == ["system", "user", "assistant", "user", "assistant"]


GOOD = {"messages": [turn("user", "Hi?"), turn("assistant", "Yes.")]}
BAD = {
    "no columns": ({"question": "x"}, r"line 4 of 'rows\.jsonl' has columns question; sft\.py reads 'messages'"),
    "null": ({"messages": None}, r"line 4 of 'rows\.jsonl' has columns nothing"),
    "empty": ({"messages": []}, r"line 4 of .*: messages must be a list of messages, got \[\]"),
    "no list": ({"messages": 3}, r"line 4 of .*: messages must be a list of messages, got 3"),
    "a text": ({"messages": ["hi"]}, r"line 4 of .*: message 1 must have role and content, got 'hi'"),
    "role": ({"messages": [turn("narrator", "x")]}, r"line 4 of .*: message 1 has the role 'narrator'; valid are sys"),
    "no role": ({"messages": [{"content": "x"}]}, r"line 4 of .*: message 1 has the role None"),
    "no content": ({"messages": [turn("user", "x"), turn("assistant", None)]}, r"message 2 \(assistant\) has no cont"),
    "picture": ({"messages": [turn("user", [{"type": "image"}])]}, r"line 4 of .*: message 1 has content that is no"),
    "no answer": ({"messages": [turn("user", "x")]}, r"line 4 of .* has no assistant message"),
    "call": ({"messages": [turn("assistant", "", tool_calls=[{}])]}, r"line 4 .*: message 1 has a tool call without"),
    "arguments": ({"messages": [turn("assistant", "", tool_calls=call("{"))]}, r"arguments of 'weather' is not JSON"),
    "tools": ({**GOOD, "tools": "[{"}, r"line 4 of 'rows\.jsonl': tools is not JSON"),
    "another kind": (
        {"prompt": "a", "completion": "b"},
        r"line 4 of .* has prompt and completion, but the first row m",
    ),
    "no object": ([1], r"line 4 of 'rows\.jsonl' is not a JSON object, but '\[1\]'"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_with_what_is_missing(case, tmp_path, capsys):
    row, expected = BAD[case]
    recipe.save_model(tmp_path / "model")
    path = recipe.write_rows(tmp_path / "rows.jsonl", [GOOD] * 3 + [row] + [GOOD] * 3)
    words = ["--model_name_or_path", tmp_path / "model", "--dataset_name", path, "--chat_template_path", "chatml"]
    assert recipe.run("sft", *words, "--output_dir", tmp_path / "out") == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("sft: dataset_name: ")
    assert re.search(expected, line), line


@pytest.mark.parametrize("text", ['{"text": "a"}\n{"text": "\\ud83d"}\n', '{"text": "a"}\n{"text": \n'])
def test_a_line_that_holds_no_text_is_named(text, tmp_path, capsys):
    """Half of a surrogate pair; a line that breaks off."""
    recipe.save_model(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(text)
    words = ["--model_name_or_path", tmp_path / "model", "--dataset_name", tmp_path / "rows.jsonl"]
    assert recipe.run("continue_pretrain", *words, "--output_dir", tmp_path / "out") == 1
    assert "line 2 of 'rows.jsonl' is not JSON" in capsys.readouterr().err.strip().splitlines()[-1]


def test_the_chat_template_is_refused_before_the_model_is_loaded(tmp_path, capsys):
    recipe.save_model(tmp_path / "model")
    save_file({}, tmp_path / "model" / "model.safetensors")  # without weights it could not be
    path = recipe.write_rows(tmp_path / "rows.jsonl", [GOOD] * 12)
    words = ["--model_name_or_path", tmp_path / "model", "--dataset_name", path, "--output_dir", tmp_path / "out"]
    assert recipe.run("sft", *words) == 1
    assert "has no chat template; name one" in capsys.readouterr().err.strip().splitlines()[-1]
