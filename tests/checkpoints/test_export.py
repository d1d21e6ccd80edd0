"""Exporting reads what `from_pretrained` reads, whatever else lies in the folder."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tiny
from hf_lnscale.checkpoints.export import export


@pytest.fixture
def sharded(tmp_path):
    folder = tmp_path / "sharded"
    tiny.model(ln_scaling=True).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def require_equal(source, tmp_path):
    """What was exported does what `from_pretrained` of the source does."""
    out = export(source, tmp_path / "out", progress=False)
    loaded, exported = (AutoModelForCausalLM.from_pretrained(folder) for folder in (source, out))
    assert torch.equal(loaded(tiny.tokens()).logits, exported(tiny.tokens()).logits)
    return out


def test_a_single_file_beside_a_sharded_set(sharded, tmp_path):
    """transformers takes the single file, here that of another model."""
    tiny.model(seed=1, ln_scaling=True).save_pretrained(tmp_path / "single")
    shutil.copy(tmp_path / "single/model.safetensors", sharded)
    out = require_equal(sharded, tmp_path)
    assert sorted(path.name for path in out.glob("*.safetensors*")) == ["model.safetensors"]


def test_a_shard_that_holds_more_than_the_index_reads_from_it(sharded, tmp_path):
    """Left over from another run: a file with tensors that the index reads elsewhere."""
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    tiny.model(seed=1, ln_scaling=True).save_pretrained(tmp_path / "single")
    stale = sorted(set(index["weight_map"].values()))[0]
    moved = [name for name, file in index["weight_map"].items() if file == stale]
    shutil.copy(sharded / stale, sharded / "model-moved.safetensors")
    index["weight_map"] |= dict.fromkeys(moved, "model-moved.safetensors")
    kept = next(iter(moved))
    index["weight_map"][kept] = stale
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    require_equal(sharded, tmp_path)


def test_shards_of_one_name_in_two_folders(sharded, tmp_path):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    moved = {file: f"part{i}/model.safetensors" for i, file in enumerate(sorted(set(index["weight_map"].values())))}
    for file, new in moved.items():
        (sharded / new).parent.mkdir()
        shutil.move(sharded / file, sharded / new)
    index["weight_map"] = {name: moved[file] for name, file in index["weight_map"].items()}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    require_equal(sharded, tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "[]",
        '{"weight_map": 1}',
        '{"weight_map": {"a": 5}}',
        '{"weight_map": {"a": "../a.safetensors"}}',
        "no JSON",
    ],
)
def test_an_index_of_another_shape(content, sharded, tmp_path):
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match="is not an index of safetensors files"):
        export(sharded, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_what_was_written_is_read_again(sharded, tmp_path, monkeypatch):
    """As by a disk that loses a write."""
    monkeypatch.setattr("hf_lnscale.checkpoints.export._fold_tensor", lambda *args: None)
    with pytest.raises(ValueError, match="was not written correctly"):
        export(sharded, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_layer_for_multi_token_prediction_is_left_alone(tmp_path):
    """DeepSeek stores it behind the last one, under the next number."""
    tiny.model("deepseek_v3", ln_scaling=True).save_pretrained(tmp_path / "scaled")
    file = tmp_path / "scaled/model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    behind = "model.layers.4.input_layernorm.weight"
    before = load_file(file) | {behind: torch.rand(tiny.HIDDEN)}
    save_file(before, file, metadata)
    after = load_file(export(tmp_path / "scaled", tmp_path / "out", progress=False) / "model.safetensors")
    assert torch.equal(after[behind], before[behind])
    last = behind.replace("4", "3")
    assert torch.equal(after[last], before[last] * 0.5)


def test_only_files_of_the_model_are_copied_and_the_result_can_be_replaced(tmp_path):
    """A recipe's output folder also holds samples of the data, paths of this machine, and logs."""
    model = ["README.md", "LICENSE.txt", "chat_template.jinja", "spiece.model", "modeling_tiny.py", "vocab.txt"]
    run = ["control.json", "metrics.json", "run.json", "samples.jsonl", "events.out.tfevents.1.host", "train.log"]
    tiny.model(ln_scaling=True).save_pretrained(tmp_path / "run")
    for name in (*model, *run, "additional_chat_templates/tool.jinja", "checkpoint-5/model.safetensors", "logs/a.txt"):
        path = tmp_path / "run" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    for force in (False, True):
        out = export(tmp_path / "run", tmp_path / "out", force=force, progress=False)
        found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
        assert found == {
            *model, "additional_chat_templates/tool.jinja", "config.json", "generation_config.json", "model.safetensors"
        }  # fmt: skip
        assert all((out / name).read_text() == name for name in model)
