"""What the recipes read, and what they hold out of it."""

import datasets
import pytest

import recipe
from hf_lnscale.training.arguments import DataArguments
from hf_lnscale.training.recipe_data import LINES_A_ROW, first_texts, load_conversations, load_text


@pytest.fixture(autouse=True)
def _no_shared_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def texts(data, column="text"):
    return [row[column] for row in data]


def test_rows_are_held_out_of_training(tmp_path):
    path = recipe.write_rows(tmp_path / "text.jsonl", [{"text": f"text {i}"} for i in range(100)])
    train, held_out = load_text(DataArguments(dataset_name=str(path), eval_samples=256), "text", seed=3)
    assert (len(train), len(held_out)) == (90, 10)  # a tenth at the most
    assert sorted(texts(train) + texts(held_out)) == sorted(f"text {i}" for i in range(100))
    assert texts(held_out) == texts(load_text(DataArguments(dataset_name=str(path)), "text", seed=3)[1])
    assert texts(held_out) != texts(load_text(DataArguments(dataset_name=str(path)), "text", seed=4)[1])
    stream = DataArguments(dataset_name=str(path), dataset_streaming=True, eval_samples=7)
    train, held_out = load_text(stream, "text", seed=3)
    assert texts(held_out) == [f"text {i}" for i in range(7)]
    assert texts(train) == [f"text {i}" for i in range(7, 100)]


def test_other_data_to_evaluate_on(tmp_path):
    path = recipe.write_rows(tmp_path / "text.jsonl", [{"text": f"text {i}"} for i in range(10)])
    other = recipe.write_rows(tmp_path / "other.jsonl", [{"text": f"other {i}"} for i in range(10)])
    arguments = DataArguments(dataset_name=str(path), eval_dataset_name=str(other), eval_samples=3)
    train, held_out = load_text(arguments, "text", seed=0)
    assert len(train) == 10
    assert texts(held_out) == ["other 0", "other 1", "other 2"]


def test_splits_of_files(tmp_path):
    """A file has none: what is evaluated on is held out of it. Of a folder, files have the names of splits."""
    folder = tmp_path / "data"  # beside the cache
    folder.mkdir()
    paths = {
        name: recipe.write_rows(folder / name, [{"text": f"{name} {i}"} for i in range(count)])
        for name, count in {"a.jsonl": 20, "b.jsonl": 5, "test-0001.jsonl": 4, "testament.jsonl": 3}.items()
    }
    for streaming in (False, True):
        common = {"dataset_test_split": "test", "dataset_streaming": streaming, "eval_samples": 2}
        train, held_out = load_text(DataArguments(dataset_name=str(paths["a.jsonl"]), **common), "text", seed=0)
        assert sorted(texts(train) + texts(held_out)) == sorted(f"a.jsonl {i}" for i in range(20))
        train, held_out = load_text(DataArguments(dataset_name=str(folder), **common), "text", seed=0)
        assert {text.split()[0] for text in texts(train)} == {"a.jsonl", "b.jsonl", "testament.jsonl"}
        assert texts(held_out) == ["test-0001.jsonl 0", "test-0001.jsonl 1"]
    (folder / "train").mkdir()
    paths["a.jsonl"].rename(folder / "train" / "a.jsonl")
    train, held_out = load_text(DataArguments(dataset_name=str(folder), dataset_test_split="b"), "text", seed=0)
    assert {text.split()[0] for text in texts(train)} == {"a.jsonl"}
    assert {text.split()[0] for text in texts(held_out)} == {"b.jsonl"}
    given = DataArguments(dataset_name=str(paths["b.jsonl"]), eval_dataset_name=str(paths["testament.jsonl"]),
                          dataset_test_split="test")  # fmt: skip
    assert {text.split()[0] for text in texts(load_text(given, "text", seed=0)[1])} == {"testament.jsonl"}


def test_rows_without_text_are_left_out(tmp_path):
    rows = [{"text": None}, {"text": ""}, *({"text": f"text {i}"} for i in range(6))]
    path = recipe.write_rows(tmp_path / "text.jsonl", rows)
    for streaming in (False, True):
        arguments = DataArguments(dataset_name=str(path), dataset_streaming=streaming, eval_samples=1)
        train, held_out = load_text(arguments, "text", seed=0)
        assert sorted(texts(train) + texts(held_out)) == [f"text {i}" for i in range(6)]


def test_a_text_file_is_read_as_it_is(tmp_path):
    """No line and no blank line is lost; a hundred lines are a row."""
    lines = [f"line {i}" if i % 3 else "" for i in range(3 * LINES_A_ROW + 8)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    train, held_out = load_text(DataArguments(dataset_name=str(tmp_path / "text.txt")), "text", seed=0)
    rows = sorted(texts(train) + texts(held_out), key=lambda row: int(row.split("line ")[1].split("\n")[0]))
    assert "\n".join(rows) == "\n".join(lines)
    assert len(rows) == 4


def test_a_text_column_beside_others_is_text(tmp_path):
    """With a column of messages beside it, TRL would take the rows for chats."""
    rows = [{"body": f"text {i}", "messages": recipe.CHAT[0]["messages"], "prompt": "x"} for i in range(10)]
    path = recipe.write_rows(tmp_path / "rows.jsonl", rows)
    train, held_out = load_text(DataArguments(dataset_name=str(path)), "body", seed=0)
    assert train.column_names == held_out.column_names == ["body"]


def test_chats_beside_text_are_chats(tmp_path):
    rows = [{"text": "x", **row} for row in recipe.CHAT]
    path = recipe.write_rows(tmp_path / "rows.jsonl", rows)
    train, _ = load_conversations(DataArguments(dataset_name=str(path)), seed=0)
    assert train.column_names == ["messages"]


def test_text_that_comes_with_python():
    train, held_out = load_text(DataArguments(), "text", seed=0)
    assert sum(map(len, texts(train))) > 500_000
    assert not set(texts(train)) & set(texts(held_out))
    chats, _ = load_conversations(DataArguments(), seed=0)
    assert len(chats) > 1000
    assert [turn["role"] for turn in chats[0]["messages"]] == ["user", "assistant"]


def test_a_folder_of_several_kinds_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    recipe.write_rows(tmp_path / "b.jsonl", [{"text": "x"}])
    with pytest.raises(ValueError, match=r"mixes, or is not one of, \.txt, \.jsonl"):
        load_text(DataArguments(dataset_name=str(tmp_path)), "text", seed=0)


def test_first_texts_stop_where_there_are_enough():
    rows = [{"text": "x" * 10}] * 10
    assert len(list(first_texts(rows, "text", characters=35))) == 4
