"""Models and texts that nothing can be measured of: each verb says so in one line, and writes nothing."""

import os
import re
import sys

import pytest
import torch
from safetensors.torch import save_file

import recipe
import tiny
from hf_lnscale.commands.main import main

TEXT = "a text that every tokenizer knows how to cut into pieces. " * 40


@pytest.fixture
def cli(capsys, monkeypatch):
    """Runs `hf-lnscale` in this process; returns the exit code, and what it printed to stdout and to stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hf-lnscale", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        return left.value.code, *capsys.readouterr()

    return run


def zero(model):
    for parameter in model.parameters():
        parameter.zero_()


def not_a_number(model):
    model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan


VERBS = {
    "prune": ("--layers", "1", "--out", "out"),
    "diagnose": ("--no-plots", "--out", "out"),
    "evaluate": ("--no-speed",),
}
MODELS = {  # what is changed in the configuration and in the weights, what is said of it, and by which verbs
    "all weights zero": ({}, zero, "zero", ["diagnose"]),
    "weights that are no numbers": (
        {}, not_a_number, r"; the weight .*layers\.1\.mlp\.down_proj\.weight is not finite$", list(VERBS),
    ),
    "a single layer": ({"num_hidden_layers": 1}, lambda model: None, "only one layer", ["prune"]),
    "fewer ids than the tokenizer": (
        {"vocab_size": 150}, lambda model: None, "vocabulary", list(VERBS),
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("which", MODELS)
def test_models(which, verb, tmp_path, monkeypatch, cli):
    changes, edit, message, refusing = MODELS[which]
    monkeypatch.chdir(tmp_path)
    recipe.tokenizer().save_pretrained("model")
    model = tiny.model(**({"vocab_size": 300} | changes))
    with torch.no_grad():
        edit(model)
    model.save_pretrained("model")
    (tmp_path / "text.txt").write_text(TEXT)
    said = cli(verb, "model", "--data", "text.txt", "--seq-len", 32, *VERBS[verb])
    if verb not in refusing:  # figures are what they are
        assert said[0] == 0, said
        return
    refused(said, message)
    assert sorted(os.listdir()) == ["model", "text.txt"]


TEXTS = {
    "half of a surrogate pair": ('{"text": "a"}\n{"text": "\\ud83d"}\n', "line 2 of 'rows.jsonl'"),
    "nested deeply": ('{"text": "a"}\n' + "[" * 100_000, "line 2 of 'rows.jsonl'"),
    "numbers in place of text": ('{"text": 1}', "column 'text' must hold strings"),
    "no column of a known name": ('{"words": "a"}', "column 'text' or 'messages'"),
    "chats of another form": ('{"messages": 3}', "messages"),
    "nothing": ("", "no text|holds 0 token|is empty"),
}


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("which", TEXTS)
def test_texts(which, verb, tmp_path, monkeypatch, cli):
    text, message = TEXTS[which]
    monkeypatch.chdir(tmp_path)
    recipe.save_model(tmp_path / "model")
    save_file({}, tmp_path / "model" / "model.safetensors")  # no weight is read
    (tmp_path / "rows.jsonl").write_text(text)
    refused(cli(verb, "model", "--data", "rows.jsonl", "--seq-len", 32, *VERBS[verb]), message)
    assert sorted(os.listdir()) == ["model", "rows.jsonl"]


def refused(said, message):
    code, _, err = said
    line, *hint = err[err.rindex("hf-lnscale: ") :].splitlines()  # behind messages and a bar of progress
    assert code == 1, said
    assert re.search(message, line), line
    assert len(hint) <= 1
    assert "--debug" not in err, err  # an error of this package's, not one of another's
