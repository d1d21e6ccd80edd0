"""Chats for training: converts rows in all common formats to messages, and checks the chat template."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Json, List, Value
from trl.chat_template_utils import get_training_chat_template, has_generation_markers, supports_tool_calling

from ..core.json_file import parse
from .arguments import RecipeConfig
from .scripts import recipes_folder

# Names of roles in ShareGPT and other formats.
ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "function_call": "assistant", "observation": "tool", "function": "tool", "function_response": "tool",
    "ipython": "tool", "developer": "system",
}  # fmt: skip
_FORMATS = (("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"))


def to_chat(row: dict[str, Any], where: str, columns: list[str] | None = None) -> dict[str, Any]:
    """Converts a row to a chat (messages, or prompt and completion of messages, with columns `tools` and
    `chat_template_kwargs`) or to a text prompt and completion. `where` locates it in error messages."""
    given = _first_format(row, where, columns)
    if isinstance(given.get("prompt"), str):
        if not isinstance(given["completion"], str):
            raise ValueError(f"dataset_name: {where}: completion must be text, got {given['completion']!r}")
        return given
    if "instruction" in given:
        question = "\n\n".join(str(row[name]) for name in ("instruction", "input") if row.get(name))
        turns = [("system", row.get("system")), ("user", question), ("assistant", row["output"])]
        given = {"messages": [{"role": role, "content": text} for role, text in turns if role != "system" or text]}
    chat: dict[str, Any] = {
        "messages" if name == "conversations" else name: _messages(value, f"{where}: {name}")
        for name, value in given.items()
    }
    if not any(message["role"] == "assistant" for message in chat.get("messages") or chat["completion"]):
        raise ValueError(f"dataset_name: {where} has no assistant message, so there is nothing to learn")
    tools = _decoded(row.get("tools") or None, f"{where}: tools")
    keywords = row.get("chat_template_kwargs") or {}
    return {**chat, "tools": json.dumps(tools) if tools else None, "chat_template_kwargs": keywords}


def kind_of(row: dict[str, Any]) -> str:
    """Describes the format of a converted row."""
    names = [name for name in row if name not in ("tools", "chat_template_kwargs")]
    return " and ".join(names) + (" of messages" if "tools" in row and "prompt" in row else "")


def features_of(row: dict[str, Any]) -> Features:
    """The types of a converted row's columns."""
    types = {"tools": Value("string"), "chat_template_kwargs": Json()}
    others = List(Json()) if "tools" in row else Value("string")
    return Features({name: types.get(name, others) for name in row})


def _first_format(row: dict[str, Any], where: str, columns: list[str] | None) -> dict[str, Any]:
    """The columns of the first format for which the row has every column."""
    for names in _FORMATS:
        if all((not columns or name in columns) and row.get(name) is not None for name in names):
            return {name: row[name] for name in names}
    hint = "; for raw text use continue_pretrain.py" if isinstance(row.get("text"), str) else ""
    has = ", ".join(str(name) for name, value in row.items() if value is not None) or "nothing"
    raise ValueError(
        f"dataset_name: {where} has columns {has}; sft.py reads 'messages', 'conversations', 'prompt' and "
        f"'completion', or 'instruction' and 'output'{hint}"
    )


def _decoded(value: Any, where: str) -> Any:
    """Decodes a value that may be a JSON string: anything in CSV, and tools and arguments in OpenAI's format."""
    try:
        return parse(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"dataset_name: {where} is not JSON: {error}") from None


def _messages(value: Any, where: str) -> list[dict[str, Any]]:
    value = _decoded(value, where)
    if not isinstance(value, list) or not value:
        raise ValueError(f"dataset_name: {where} must be a list of messages, got {value!r}")
    return [_message(message, f"{where}: message {number}") for number, message in enumerate(value, 1)]


def _message(given: Any, where: str) -> dict[str, Any]:
    """A message with `role`, text `content`, and `tool_calls`, if any, with arguments as objects."""
    if not isinstance(given, dict):
        raise ValueError(f"dataset_name: {where} must have role and content, got {given!r}")
    message = {key: value for key, value in given.items() if value is not None}
    for name, alias in (("role", "from"), ("content", "value")):
        if name not in message and alias in message:
            message[name] = message.pop(alias)
    given_role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    role = ROLES.get(str(given_role).lower(), given_role)
    if role not in ("system", "user", "assistant", "tool"):
        known = ", ".join(["system", "user", "assistant", "tool", *ROLES])
        raise ValueError(f"dataset_name: {where} has the role {given_role!r}; valid are {known}")
    if given_role == "function_call":
        call = _decoded(content, where)
        content, calls = "", call if isinstance(call, list) else [call]
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise ValueError(f"dataset_name: {where} has content that is not text: {str(content)[:80]}")
        content = "".join(part["text"] for part in content)
    elif content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise ValueError(f"dataset_name: {where} ({role}) has no content" + (f", but {content!r}" if content else ""))
    message |= {"role": role, "content": content}
    message.pop("tool_calls", None)
    return message | {"tool_calls": [_call(call, where) for call in calls]} if calls else message


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"dataset_name: {where} has a tool call without a function name: {call!r}")
    # As an object, since templates that write JSON would quote a string again.
    arguments = _decoded(function.get("arguments") or {}, f"{where}: arguments of {function['name']!r}")
    named = {"name": function["name"], "arguments": arguments}
    return {"type": "function", "function": named} | ({"id": call["id"]} if call.get("id") else {})


def prepare_chat(training: RecipeConfig, tokenizer: Any, train: Any) -> None:
    """Chooses the chat template for the data, and whether to train only on the assistant's answers.

    Raises:
        ValueError: if the data is chats and the template is missing, does not mark answers, or drops tool calls.
        FileNotFoundError: if the template file does not exist.
    """
    if training.chat_template_path == "chatml":
        training.chat_template_path = str(recipes_folder() / "configs" / "chatml.jinja")
    is_chat = "tools" in train.column_names
    if training.assistant_only_loss is None:
        training.assistant_only_loss = is_chat
    if not is_chat:
        return
    path = training.chat_template_path
    advice = "name one with --chat_template_path: chatml, a .jinja file, or the tokenizer of a chat model"
    if path is None:
        if not tokenizer.chat_template:
            raise ValueError(f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; {advice}")
    elif path.endswith((".jinja", ".j2")):
        if not Path(path).is_file():
            raise FileNotFoundError(f"chat_template_path: there is no file {path!r}")
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
    else:
        return
    shown = f"the chat template of {path or tokenizer.name_or_path!r}"
    if training.assistant_only_loss and not has_generation_markers(tokenizer.chat_template):
        try:
            get_training_chat_template(tokenizer)
        except ValueError:
            problem = f"{shown} does not mark the assistant's tokens"
            raise ValueError(f"{problem}; {advice}, or train on all with --assistant_only_loss false") from None
    rows = train if isinstance(train, Dataset) else itertools.islice(train, 1000)
    if any(_uses_tools(row) for row in rows) and not supports_tool_calling(tokenizer):
        raise ValueError(f"{shown} drops tool calls, which the data has; {advice}")


def _uses_tools(row: dict[str, Any]) -> bool:
    messages = row.get("messages") or [*row["prompt"], *row["completion"]]
    return bool(row.get("tools")) or any(message.get("tool_calls") for message in messages)
