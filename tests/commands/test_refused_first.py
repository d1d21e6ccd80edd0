"""What is cheap to check is checked before what is expensive: before weights are read, and processes started."""

import re
import shutil
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedModel

import recipe
from hf_lnscale.commands.main import main
from hf_lnscale.evaluation import speed
from hf_lnscale.measuring.sample import documents, train_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and the same without weights, with weights that were cut off, without a tokenizer and with another."""
    folder = tmp_path_factory.mktemp("wrong")
    recipe.save_model(folder / "model")
    for name in ("weightless", "torn", "mute", "foreign"):
        shutil.copytree(folder / "model", folder / name)
    (folder / "weightless/model.safetensors").unlink()
    weights = (folder / "torn/model.safetensors").read_bytes()
    (folder / "torn/model.safetensors").write_bytes(weights[:-1])
    for file in (folder / "mute").glob("token*"):
        file.unlink()
    train_tokenizer(documents(standard_library=False)[:10], 270).save_pretrained(folder / "foreign")
    (folder / "text.txt").write_text("a text that every tokenizer knows. " * 400)
    (folder / "empty.txt").write_text(" \n")
    (folder / "file").touch()
    recipe.write_rows(folder / "rows.jsonl", recipe.text_rows())
    return folder


WEIGHTLESS, TORN = "the folder 'weightless' has no weights", "cannot read 'torn/model.safetensors': .*"
IN_A_FILE = "'file/.*' cannot be created: '.*file' is a file"
MUTE = "the folder 'mute' has no tokenizer"
EVALUATE = "evaluate model --data text.txt --seq-len 32"
DIAGNOSE = "diagnose model --data text.txt --seq-len 32 --out new"
PRUNE = "prune model --data text.txt --seq-len 32 --out new"
ADOPT = "adopt model --data text.txt --seq-len 32 --out new"
TRAIN = "--model_name_or_path model --dataset_name rows.jsonl --max_steps 1 --use_cpu --report_to none --output_dir new"
REFUSED = {
    "evaluate model weightless --data text.txt --seq-len 32": WEIGHTLESS,
    "evaluate model torn --data text.txt --seq-len 32": TORN,
    f"{EVALUATE} --limit 0": "--limit must be an integer >= 1, got 0",
    f"{EVALUATE} --num-fewshot -1": "--num-fewshot must be an integer >= 0, got -1",
    f"{EVALUATE} --prompt-tokens 0": "--prompt-tokens must be an integer >= 1, got 0",
    f"{EVALUATE} --prompt-tokens 65": "--prompt-tokens must be at most 64, the number of positions of 'model', got 65",
    f"{EVALUATE} --out file/x.json": f"--out {IN_A_FILE}",
    "diagnose torn --data text.txt --seq-len 32 --out new": TORN,
    f"{DIAGNOSE} --compare weightless": WEIGHTLESS,
    f"{DIAGNOSE} --compare torn": TORN,
    f"{DIAGNOSE} --out file/x": f"--out {IN_A_FILE}",
    "prune torn --data text.txt --seq-len 32 --layers 1 --out new": TORN,
    f"{PRUNE} --target-params 1": "--target-params must be at least .*, got 1",
    f"{PRUNE} --target-params 10B": "--target-params 10000000000 is already met by the unchanged model",
    f"{PRUNE} --target-memory 1": "--target-memory must be at least .*, got 1",
    f"{PRUNE} --target-memory 100GiB": "--target-memory .* is already met by the unchanged model",
    f"{PRUNE} --layers 1 --held-out nowhere": "--held-out: there is no file 'nowhere'",
    f"{PRUNE} --layers 1 --held-out empty.txt": "--held-out: empty.txt has 0 token",
    f"{PRUNE} --layers 1 --out file/x": f"--out {IN_A_FILE}",
    "export no-such/model --out new": "cannot read 'no-such/model'",
    "export model --format zeros --out new": "'model' needs no zeros",
    f"{ADOPT} --out file/x": f"--out {IN_A_FILE}",
    "adopt torn --data text.txt --seq-len 32 --out new": TORN,
    "demo --fast --out file": "--out 'file' cannot be created: '.*file' is a file",
    **{
        f"train {verb} {TRAIN} {wrong}": f"{name}: {message}"
        for verb, name in {"continue": "continue_pretrain", "heal --drop_layers 1": "heal"}.items()
        for wrong, message in {
            "--output_dir file/x": f"output_dir {IN_A_FILE}",
            "--max_length 1": "max_length must be at least 2, got 1",
            "--per_device_train_batch_size 0": "per_device_train_batch_size must be at least 1, got 0",
            "--learning_rate -1": "learning_rate must be at least 0, got -1",
            "--model_name_or_path weightless": f"model_name_or_path: {WEIGHTLESS}",
            "--model_name_or_path torn": f"model_name_or_path: {TORN}",
            "--model_name_or_path mute": MUTE,
        }.items()
    },
    f"train heal {TRAIN} --drop_layers 1 --teacher no-such/model": "heal: teacher: cannot read 'no-such/model'",
    f"train heal {TRAIN} --drop_layers 1 --teacher torn": f"heal: teacher: {TORN}",
    f"train heal {TRAIN} --drop_layers 1 --teacher foreign": "heal: teacher: the tokenizer of 'foreign'",
    "train pretrain --output_dir new --use_cpu --dataset_name rows.jsonl --num_hidden_layers 0": (
        "pretrain: num_hidden_layers must be an integer >= 1, got 0"
    ),
}


@pytest.mark.parametrize("words", REFUSED)
def test_refused_before_anything_expensive(words, folder, monkeypatch, capsys):
    def expensive(*args, **kwargs):
        pytest.fail("reads weights, or starts a process")

    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", staticmethod(expensive))
    monkeypatch.setattr(speed.subprocess, "Popen", expensive)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["hf-lnscale", *words.split()])
    before = sorted(path for path in Path().iterdir() if path.name != "cache")
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 1
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("  hint: ")]
    name = "" if words.startswith("train") else "hf-lnscale: "
    assert re.match(name + REFUSED[words], said[-1]), said
    assert sorted(path for path in Path().iterdir() if path.name != "cache") == before
