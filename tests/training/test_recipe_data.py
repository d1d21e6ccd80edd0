"""What the recipes read, and what they hold out of it."""

import os

import datasets
import pytest

import recipe
from hf_lnscale.training.arguments import DataArguments
from hf_lnscale.training.recipe_data import LINES_A_ROW, first_texts, load_conversations, load_text
from hf_lnscale.training.recipe_model import load_model, load_tokenizer
from hf_lnscale.training.scripts import import_recipe
from hf_lnscale.training.trainer import RecipeTrainer


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
    assert "messages" in train.column_names
    assert "text" not in train.column_names  # TRL would take the rows for text


@pytest.mark.slow
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


# --- folders of texts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_the_files_of_a_folder_are_documents_that_end(streaming, tmp_path):
    """In the stream of tokens that is trained on, each file stands as it is, with an end of text after it."""
    folder = tmp_path / "texts"
    folder.mkdir()
    files = [f"File {i}.\n\nIts line {'x' * i}.\n" * (1 + 60 * (i % 3)) for i in range(13)]  # of up to 484 lines
    for i, text in enumerate(files):
        (folder / f"{i:02}.txt").write_text(text)
    recipe.save_model(tmp_path / "model")
    words = ["--model_name_or_path", tmp_path / "model", "--dataset_name", folder, *recipe.SMALL, "--eval_samples", 1]
    words += ["--dataset_streaming"] if streaming else []
    words += ["--output_dir", tmp_path / "out"]
    parser = import_recipe("continue_pretrain").make_parser()
    _, checkpoint, data, training = parser.parse_args_and_config([*map(str, words)])
    tokenizer = load_tokenizer(checkpoint, training)
    train, held_out = load_text(data, "text", training.seed)
    model = load_model(checkpoint, training)
    trainer = RecipeTrainer(
        model=model, args=training, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer
    )
    end = tokenizer.eos_token
    ids = [id for part in (trainer.train_dataset, trainer.eval_dataset) for row in part for id in row["input_ids"]]
    stream = tokenizer.decode(ids)
    assert sorted(stream.split(end)) == sorted(["", *files])


def test_a_large_file_of_a_folder_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_lnscale.training.recipe_data.LARGE_FILE", 1000)
    folder = tmp_path / "texts"
    folder.mkdir()
    lines = [f"line {i}" for i in range(250)]
    (folder / "a.txt").write_text("\n".join(lines))
    (folder / "b.txt").write_text("short")
    train, held_out = load_text(DataArguments(dataset_name=str(folder)), "text", seed=0)
    expected = ["\n".join(lines[start : start + 100]) for start in (0, 100, 200)] + ["short"]
    assert sorted(texts(train) + texts(held_out)) == sorted(expected)


@pytest.mark.parametrize("kept_time", [False, True])
def test_a_file_that_changed_is_read_again(kept_time, tmp_path):
    """In its time or, as when a file is unpacked over another, in its size alone."""
    for text in ("one", "three"):
        path = recipe.write_rows(tmp_path / "text.jsonl", [{"text": text}] * 4)
        if kept_time:
            os.utime(path, (1, 1))
        assert set(texts(load_text(DataArguments(dataset_name=str(path)), "text", seed=0)[0])) == {text}


@pytest.mark.parametrize(("rows", "wanted", "held"), [(2, 256, 1), (9, 256, 1), (10, 256, 1), (29, 256, 2), (50, 3, 3)])
def test_what_is_held_out_is_what_is_said(rows, wanted, held, tmp_path):
    """A tenth at most, but one row at least."""
    path = recipe.write_rows(tmp_path / "text.jsonl", [{"text": f"text {i}"} for i in range(rows)])
    train, held_out = load_text(DataArguments(dataset_name=str(path), eval_samples=wanted), "text", seed=0)
    assert (len(train), len(held_out)) == (rows - held, held)


# --- mixtures -------------------------------------------------------------------------------------------------------


def mixture(*parts, **more):
    return DataArguments(datasets=list(parts), **more)


def test_a_mixture_by_fractions(tmp_path):
    """Rows are drawn until one of the parts is used up; none is drawn twice."""
    new = recipe.write_rows(tmp_path / "new.jsonl", [{"text": f"new {i}"} for i in range(2000)])
    old = recipe.write_rows(tmp_path / "old.jsonl", [{"body": f"old {i}", "more": 1} for i in range(500)])
    parts = [{"path": str(new), "fraction": 0.95}, {"path": str(old), "fraction": 0.05, "columns": ["body"]}]
    for streaming in (False, True):
        train, held_out = load_text(mixture(*map(dict, parts), streaming=streaming, eval_samples=10), "text", seed=0)
        found = texts(train) + texts(held_out)
        assert len(set(found)) == len(found) > 1900
        # Of 2000 draws, 100 with a standard deviation of sqrt(2000 * 0.05 * 0.95) = 10.
        assert 60 < sum(text.startswith("old") for text in found) < 140


def test_a_mixture_without_fractions_is_all_rows(tmp_path):
    """Of chats in formats that differ."""
    recipe.write_rows(tmp_path / "a.jsonl", recipe.CHAT[:8])
    recipe.write_rows(tmp_path / "b.jsonl", [{"instruction": f"Say {i}.", "output": f"{i}"} for i in range(7)])
    parts = [{"path": str(tmp_path / name)} for name in ("a.jsonl", "b.jsonl")]
    train, held_out = load_conversations(mixture(*parts), seed=0)
    found = [row["messages"][1]["content"] for part in (train, held_out) for row in part]
    expected = [row["messages"][1]["content"] for row in recipe.CHAT[:8]] + [f"{i}" for i in range(7)]
    assert sorted(found) == sorted(expected)


def test_a_mixture_from_a_config(tmp_path):
    """As a YAML file gives it, to the recipe's parser."""
    recipe.write_rows(tmp_path / "a.jsonl", [{"text": f"text {i}"} for i in range(20)])
    (tmp_path / "mix.yaml").write_text(f"datasets:\n- path: {tmp_path / 'a.jsonl'}\n  fraction: 1.0\n")
    parser = import_recipe("continue_pretrain").make_parser()
    _, _, data, _ = parser.parse_args_and_config(["--config", str(tmp_path / "mix.yaml")])
    train, held_out = load_text(data, "text", seed=0)
    assert (len(train), len(held_out)) == (18, 2)


def test_mixtures_that_are_none(tmp_path):
    recipe.write_rows(tmp_path / "a.jsonl", recipe.CHAT)
    recipe.write_rows(tmp_path / "b.jsonl", [{"prompt": "x", "completion": "y"}] * 9)
    a, b = ({"path": str(tmp_path / name)} for name in ("a.jsonl", "b.jsonl"))
    with pytest.raises(ValueError, match=r"the same kind; .*a\.jsonl' has messages.*b\.jsonl' has prompt, comp"):
        load_conversations(mixture(dict(a), dict(b)), seed=0)
    with pytest.raises(ValueError, match=r"fraction must be positive for all or omitted for all, got \[0.5, 0.0\]"):
        load_conversations(mixture(a | {"fraction": 0.5}, dict(a)), seed=0)
    with pytest.raises(ValueError, match="dataset_name and datasets are both given"):
        mixture(a, dataset_name="b")
