"""`hf-lnscale diagnose`: the folder it writes, and what it refuses before a model is loaded."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import tiny
from hf_lnscale import Diagnosis, diagnose
from hf_lnscale.checkpoints.names import Placement
from hf_lnscale.commands.main import app
from hf_lnscale.core.display import compact
from hf_lnscale.core.errors import CheckpointError
from hf_lnscale.diagnosis import verdict
from hf_lnscale.measuring.text import Windows


def save_tokenizer(folder, vocabulary):
    words = {"<unk>": 0} | {f"w{i}": i for i in range(3, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, changes in {"plain": {}, "scaled": {"ln_scaling": True}}.items():
        tiny.model("qwen3", **changes).save_pretrained(folder / name)
        save_tokenizer(folder / name, 96)
    (folder / "text.txt").write_text(" ".join(f"w{i}" for i in tiny.tokens(1, 400)[0].tolist()))
    return folder


def command(checkpoints, *arguments, model="plain"):
    fixed = ["--data", str(checkpoints / "text.txt"), "--seq-len", "32", "--tokens", "256"]
    words = ["diagnose", str(checkpoints / model), *fixed, *map(str, arguments)]
    return CliRunner().invoke(app, words, obj=SimpleNamespace(debug=False))


CHEAP = ("--no-loss", "--no-jacobian", "--no-plots")


@pytest.mark.slow
def test_the_command_writes_everything(checkpoints, tmp_path):
    done = command(checkpoints, "--out", tmp_path / "out", "--compare", checkpoints / "scaled")
    assert done.exit_code == 0, done.output
    names = {"report.html", "diagnosis.json", "compare.json"}
    names |= {f"{what}.{kind}" for what in ("variance", "angular", "loss_added", "layers") for kind in ("png", "svg")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    first, second = (Diagnosis.load(tmp_path / "out" / name) for name in ("diagnosis.json", "compare.json"))
    assert (first.name, second.name) == ("plain", "scaled")
    assert second.model["ln_scaling"]["exponent"] == 0.5
    assert first.data["num_tokens"] == 256
    assert "signs of the curse of depth" in done.stdout
    report = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert str(tmp_path) not in report  # where things lie is nobody's business
    # It is the library's.
    model = AutoModelForCausalLM.from_pretrained(checkpoints / "plain")
    direct = diagnose(model, str(checkpoints / "text.txt"), windows=Windows(seq_len=32, num_tokens=256), progress=False)
    assert direct.residual == first.residual
    assert direct.layers == first.layers


def test_json_for_scripts(checkpoints, tmp_path):
    cheap = [*CHEAP, "--json"]
    done = command(checkpoints, "--out", tmp_path / "out", *cheap)
    assert json.loads(done.stdout) == json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.html", "diagnosis.json"}
    done = command(checkpoints, "--out", tmp_path / "out", "--force", "--compare", checkpoints / "plain", *cheap)
    assert [one["model"]["name"] for one in json.loads(done.stdout)] == ["plain (1)", "plain (2)"]


def test_the_command_overwrites_nothing_unasked(checkpoints, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    done = command(checkpoints, "--out", tmp_path)
    assert isinstance(done.exception, FileExistsError)
    assert "is not empty" in str(done.exception)
    done = command(checkpoints, "--out", tmp_path, "--force")
    assert "is not a diagnosis" in str(done.exception)
    done = command(checkpoints, "--out", checkpoints)
    assert "must not be, contain or be inside" in str(done.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_failure_leaves_nothing(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_lnscale.diagnosis.png.save_all", lambda *_: 1 / 0)
    done = command(checkpoints, "--out", tmp_path / "out", *CHEAP[:-1])
    assert isinstance(done.exception, ZeroDivisionError)
    assert list(tmp_path.iterdir()) == []


def test_wrong_usage_is_told_before_anything_is_measured(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(Placement, "load", lambda *_: pytest.fail("loaded"))
    done = command(checkpoints, "--out", tmp_path / "out", "--compare", checkpoints / "missing")
    assert "missing" in str(done.exception)
    tiny.config("qwen2_vl_text").save_pretrained(tmp_path / "vision")
    done = command(checkpoints, "--out", tmp_path / "out", model=tmp_path / "vision")
    assert "is not a causal language model" in str(done.exception)
    done = command(checkpoints, "--out", tmp_path / "out", "--device", "cpu", "--device-map", "auto")
    assert "device_map" in str(done.exception)
    done = command(checkpoints, "--out", tmp_path / "out", "--data", tmp_path / "none.txt")
    assert "there is no file" in str(done.exception)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = command(checkpoints, "--out", tmp_path / "out")
    assert "hf-lnscale[plot]" in str(done.exception)


def test_the_text_is_looked_at_before_a_model_is_loaded(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(Placement, "load", lambda *_: pytest.fail("loaded"))
    (tmp_path / "empty.txt").write_text("  ")
    done = command(checkpoints, "--out", tmp_path / "out", "--data", tmp_path / "empty.txt")
    assert "predicting a token takes at least two" in str(done.exception)
    # A tokenizer with more tokens than the model has embeddings; of the second of two models.
    shutil.copytree(checkpoints / "plain", tmp_path / "other")
    save_tokenizer(tmp_path / "other", 200)
    (tmp_path / "text.txt").write_text("w3 w4 w150 w5")
    text = ("--data", tmp_path / "text.txt")
    done = command(checkpoints, "--out", tmp_path / "out", *text, "--compare", tmp_path / "other")
    assert "token id 150 is outside the model's vocabulary of 96" in str(done.exception)
    for file in (tmp_path / "other").glob("token*"):
        file.unlink()
    done = command(checkpoints, "--out", tmp_path / "out", *text, model=tmp_path / "other")
    assert isinstance(done.exception, CheckpointError)
    assert "no tokenizer" in str(done.exception)


def test_token_ids_need_no_tokenizer(checkpoints, tmp_path):
    tiny.model().save_pretrained(tmp_path / "model")
    rows = [json.dumps({"input_ids": row}) for row in tiny.tokens(3, 7).tolist()]
    (tmp_path / "ids.jsonl").write_text("\n".join(rows))
    ids = ("--data", tmp_path / "ids.jsonl")
    done = command(checkpoints, "--out", tmp_path / "out", *ids, *CHEAP, model=tmp_path / "model")
    assert done.exit_code == 0, done.output
    found = Diagnosis.load(tmp_path / "out")
    assert found.data["num_tokens"] == 21
    assert len(found.verdict["cautions"]) == 1  # token ids are taken whole, however many tokens are asked for


def test_little_text_is_a_caution_everywhere(checkpoints, tmp_path):
    (tmp_path / "text.txt").write_text("w3 w4 w50 w5")
    done = command(checkpoints, "--out", tmp_path / "out", "--data", tmp_path / "text.txt", "--no-plots")
    assert done.exit_code == 0, done.output
    found = Diagnosis.load(tmp_path / "out")
    assert not found.verdict["sufficient"]
    few, short = found.verdict["cautions"]
    assert few.startswith("4 tokens in 1 sequence are too few for a verdict")
    assert short == "The text has only 4 of the 256 tokens requested."
    assert found.baseline["perplexity_error"] is None  # of a single sequence
    for text in (" ".join(done.stdout.split()), (tmp_path / "out/report.html").read_text(encoding="utf-8")):
        assert few in text
        assert short in text
        assert found.verdict["headline"] in text


def test_standard_errors_are_shown(checkpoints, tmp_path):
    wanted = ("--tokens", 1_000_000, "--no-jacobian", "--no-plots")
    done = command(checkpoints, "--out", tmp_path / "out", *wanted, "--compare", checkpoints / "scaled")
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    for one in (Diagnosis.load(tmp_path / "out" / name) for name in ("diagnosis.json", "compare.json")):
        assert one.data["num_tokens"] == 384
        assert "The text has only 384 of the 1,000,000 tokens requested." in " ".join(done.stdout.split())
        perplexity = verdict.with_error(one.baseline["perplexity"], one.baseline["perplexity_error"])
        assert " ± " in perplexity
        assert page.count(perplexity) == 2  # beside the verdict, and in the table of differences
        for cell in one.cells("loss_added"):
            assert " ± " in cell
            assert f">{cell}</td>" in page
        assert all(cell in done.stdout for cell in one.cells("loss_added", compact))
