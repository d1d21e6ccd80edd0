"""The command line as a whole: help, errors, exit codes, completion, what a model may be."""

from __future__ import annotations

import inspect
import json
import logging
import math
import os
import subprocess
import sys
import textwrap
import warnings
from importlib import metadata

import pytest
import torch
import transformers as tf
import typer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

import hf_lnscale
import tiny
from hf_lnscale.checkpoints.export import export, read_info
from hf_lnscale.checkpoints.gguf import export_gguf
from hf_lnscale.checkpoints.hub import push
from hf_lnscale.checkpoints.names import Placement
from hf_lnscale.commands import main as module
from hf_lnscale.commands import options
from hf_lnscale.commands.demo import Demo
from hf_lnscale.core.errors import ArgumentError
from hf_lnscale.diagnosis.examine import diagnose
from hf_lnscale.diagnosis.folder import diagnose_checkpoints
from hf_lnscale.evaluation.adopt import adopt
from hf_lnscale.evaluation.comparison import Evaluation, evaluate
from hf_lnscale.measuring.text import Windows
from hf_lnscale.pruning.prune import prune

VERBS = ("demo", "info", "diagnose", "train", "evaluate", "prune", "export", "adopt", "push", "run", "env")


@pytest.fixture
def cli(capsys, monkeypatch):
    """Runs `hf-lnscale` in this process; returns what it printed to stdout and to stderr."""

    def run(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["hf-lnscale", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            module.main()
        out, err = capsys.readouterr()
        assert left.value.code == code, out + err
        return out, err

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    tiny.model().save_pretrained(folder / "plain")
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0} | {f"w{i}": i for i in range(3, 96)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder / "plain")
    (folder / "text.txt").write_text(" ".join(f"w{i}" for i in tiny.tokens(1, 300)[0].tolist()))
    return folder


# --- help and completion ----------------------------------------------------------------------------------------------


def test_help(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    out, _ = cli("--help")
    assert cli("-h")[0] == out
    lines = [line.strip("│ ").split() for line in out.splitlines()]
    listed = out[out.index("Commands") :].splitlines()
    for verb in VERBS:
        # One line each: the next begins with another verb, or the box ends.
        (at,) = (i for i, line in enumerate(listed) if line.strip("│ ").split()[:1] == [verb])
        following = listed[at + 1].strip("│ ").split(" ")[0]
        assert following in VERBS or listed[at + 1].startswith("╰"), verb
    assert ["hf-lnscale", "run", "accelerate", "launch", "train.py"] in lines
    assert "Exit codes: 0 success, 1 failure, 2 invalid command line, 130 interrupted" in out


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(cli, verb):
    out, _ = cli(verb, "--help")
    assert f"hf-lnscale {verb}" in out
    if verb in ("info", "diagnose", "evaluate", "prune", "push", "env"):
        assert "--json" in out


def test_version(cli):
    assert cli("--version")[0] == hf_lnscale.__version__ + "\n"


def test_completion(cli, monkeypatch):
    monkeypatch.setenv("_HF_LNSCALE_COMPLETE", "source_bash")
    assert "_HF_LNSCALE_COMPLETE=complete_bash" in cli()[0]
    monkeypatch.setenv("_HF_LNSCALE_COMPLETE", "complete_bash")
    for words, expected in {"hf-lnscale ev": "evaluate", "hf-lnscale prune --max": "--max-ppl-increase"}.items():
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
        assert cli()[0].split() == [expected]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (["--help"], {}),
        (["--version"], {}),
        *(([verb, "--help"], {}) for verb in VERBS if verb != "train"),
        ([], {"_HF_LNSCALE_COMPLETE": "complete_bash", "COMP_WORDS": "hf-lnscale prune --ma", "COMP_CWORD": "2"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_help_and_completion_import_nothing_heavy(arguments, environment, tmp_path):
    script = """\
    import sys
    from hf_lnscale.commands.main import main
    sys.argv = ["hf-lnscale", *sys.argv[1:]]
    try:
        main()
    finally:
        print(sorted({"torch", "transformers", "numpy", "huggingface_hub"} & set(sys.modules)), file=sys.stderr)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        capture_output=True, text=True, env={**os.environ, **environment}, cwd=tmp_path,
    )  # fmt: skip
    assert done.stderr == "[]\n", done.stderr
    assert done.stdout.strip()


# --- errors and exit codes --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("module", [["-m", "hf_lnscale"], ["-mhf_lnscale"], ["-I", "-m", "hf_lnscale"]])
def test_no_code_of_the_current_folder_is_run_as_a_module(module, folder, tmp_path):
    """Before the interpreter has imported the package, only the modules that it starts with can be shadowed."""
    for name in {*sys.stdlib_module_names, "huggingface_hub", "rich", "torch", "transformers", "typer", "yaml"}:
        (tmp_path / f"{name}.py").write_text("raise SystemExit('code of the current folder was run')")
    done = subprocess.run(
        [sys.executable, *module, "info", str(folder / "plain")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "layers" in done.stdout


def test_the_current_folder_stays_on_the_path_of_other_modules(tmp_path):
    (tmp_path / "mine.py").write_text("import hf_lnscale, sys; print(sys.path[0])")
    done = subprocess.run(
        [sys.executable, "-m", "mine", "hf_lnscale"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == str(tmp_path)


def test_an_error_is_a_line_and_a_hint(cli, tmp_path):
    out, err = cli("info", tmp_path / "nowhere", code=1)
    assert out == ""
    (first,) = err.splitlines()
    assert first.startswith("hf-lnscale: ")
    assert str(tmp_path / "nowhere") in first
    _, err = cli("info", "no-such/model", code=1)
    message, hint = err.splitlines()
    assert message.startswith("hf-lnscale: cannot read 'no-such/model': ")
    assert "offline mode" in message  # all of transformers' own message, which has two lines
    assert hint == "  hint: a model is a folder, a .gguf file or its folder, or a repository on the Hub"
    _, err = cli("info", tmp_path, code=1)
    message, same_hint = err.splitlines()
    assert message == f"hf-lnscale: the folder {str(tmp_path)!r} contains no config.json and no .gguf file"
    assert same_hint == hint


def test_debug_shows_where(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hf-lnscale", "--debug", "info", str(tmp_path / "nowhere")])
    with pytest.raises(FileNotFoundError, match="neither a folder"):
        module.main()
    cli("info", tmp_path / "nowhere", code=1)  # for that one call


TRACEBACK = 'the process failed:\nTraceback (most recent call last):\n  File "x.py", line 1\nKeyError: 3\n'
WHERE = "hf-lnscale --debug env ... shows the traceback"


@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        (KeyError("name"), "KeyError: 'name'", WHERE),
        (ZeroDivisionError(), "ZeroDivisionError", WHERE),
        (RuntimeError("One of:\n\n (1) this\n (2) that"), "One of: (1) this (2) that", WHERE),
        (RuntimeError(TRACEBACK), "the process failed: KeyError: 3", WHERE),
        (ValueError("a" * 550 + " b c " + "d" * 600), "a" * 550 + " b c ...", WHERE),
        (OSError("\x1b[31m\x07"), r"\x1b[31m\x07", WHERE),
        (torch.OutOfMemoryError("no memory"), "no memory",
         "use a smaller --batch-size or --seq-len, or --dtype bf16, to save memory"),
        (ArgumentError("num_layers", 0, "1", hint="see `as_json`"), "num_layers must be 1, got 0", "see --json"),
        (ArgumentError("as_json", "a\n", problem="no"), r"--json 'a\n' no", None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)  # fmt: skip
def test_errors_of_any_kind(error, message, hint, cli, monkeypatch):
    monkeypatch.setattr("hf_lnscale.commands.env.environment", lambda: (_ for _ in ()).throw(error))
    _, err = cli("env", code=1)
    assert err.splitlines() == [f"hf-lnscale: {message}", *([f"  hint: {hint}"] if hint else [])]


def test_options_that_would_be_ignored_are_refused(cli, folder, tmp_path):
    export, evaluate = ("export", folder / "plain", "--out"), ("evaluate", folder / "plain", "--no-speed")
    for words, message in (
        ((*export, tmp_path / "a.gguf"), "a.gguf' is a .gguf file, which requires --format gguf"),
        ((*export, tmp_path / "a", "--outtype", "q8_0"), "--outtype 'q8_0' is valid with --format gguf only"),
        ((*export, tmp_path / "a", "--converter", "x"), "--converter 'x' is valid with --format gguf only"),
    ):
        _, err = cli(*words, code=1)
        assert err.endswith(f"{message}\n")
    for words, message in (
        ((*evaluate, "--json", "--markdown"), "--json and --markdown are mutually exclusive"),
        ((*evaluate, "--tasks", ","), "--tasks: ',' contains no task"),
    ):
        assert message in " ".join(cli(*words, code=2)[1].replace("│", "").split())
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_this_package_needs_no_traceback(cli, folder, tmp_path):
    _, err = cli("export", folder / "plain", "--out", tmp_path / "out", code=1)
    assert len(err.splitlines()) == 1, err


@pytest.mark.slow
def test_one_source_with_a_weight(cli, folder, tmp_path):
    (folder / "plain.gguf").mkdir(exist_ok=True)  # no file of weights
    text = f"{folder / 'text.txt'}:0.5"
    out, _ = cli("prune", folder / "plain", "--data", text, "--seq-len", 32, "--drop", 1, "--heal", "none",
                 "--out", tmp_path / "out", "--json")  # fmt: skip
    assert json.loads(out)["layers"] == [1]


def test_arguments_are_called_by_their_options(cli, folder, tmp_path):
    """Whatever the library says of an argument: `--layers` and not `num_layers`, `--force` and not `force=True`."""
    given = (folder / "plain", "--data", folder / "text.txt", "--out", tmp_path / "out", "--seq-len", 32)
    _, err = cli("prune", *given, "--layers", 31, code=1)
    assert err.startswith("hf-lnscale: --layers must be an integer from 1 to 3")
    _, err = cli("diagnose", *given, "--tokens", 1, code=1)
    assert err.startswith("hf-lnscale: --tokens must be an integer >= 2")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").touch()
    _, err = cli("export", folder / "plain", "--out", tmp_path / "out", code=1)
    assert err.splitlines()[1] == "  hint: choose another folder, or use --force to replace it"
    _, err = cli("push", tmp_path / "nowhere", "me/model", code=1)
    assert err == f"hf-lnscale: FOLDER '{tmp_path}/nowhere' does not exist\n"


def test_every_option_has_the_name_that_the_library_uses():
    """Errors name options by the parameters of verbs; one that no function of the library has could never be named."""
    library = {
        name
        for function in (
            prune, diagnose, diagnose_checkpoints, evaluate, Evaluation.save, export, export_gguf, push, Windows,
            Placement, Demo, read_info, adopt,
        )
        for name in inspect.signature(function).parameters
    }  # fmt: skip
    own = {"as_json", "as_markdown", "context", "recipe", "format", "program", "module", "dry_run"}
    commands = typer.main.get_command(module.app).commands
    for verb, command in commands.items():
        assert {one.name for one in command.params} - own <= library, verb


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a torch without CUDA")
def test_a_device_that_is_not_there(cli, folder, tmp_path):
    with pytest.raises((AssertionError, RuntimeError)) as refused:  # a build for CUDA without a driver says another
        torch.zeros(1, device="cuda")
    _, err = cli("evaluate", folder / "plain", "--device", "cuda", code=1)
    assert err.startswith(f"hf-lnscale: --device 'cuda' is not available: {str(refused.value).splitlines()[0]}")
    assert len(err.splitlines()) == 1


def test_types_of_weights(cli, folder, tmp_path):
    given = ("evaluate", folder / "plain", "--data", folder / "text.txt", "--no-speed", "--seq-len", 32, "--json")
    for dtype, name in {"bf16": "bfloat16", "fp16": "float16", "float32": "float32"}.items():
        assert json.loads(cli(*given, "--dtype", dtype)[0])["models"][0]["dtype"] == name
    _, err = cli(*given, "--dtype", "int8", code=1)
    assert err.startswith("hf-lnscale: --dtype must be auto, float32, bfloat16, float16 or another floating-point type")


def test_a_folder_without_a_tokenizer(cli, folder, tmp_path):
    tiny.model().save_pretrained(tmp_path / "bare")
    for verb in ("evaluate", "diagnose", "prune"):
        more = [] if verb == "evaluate" else ["--out", tmp_path / "out"]
        more += ["--layers", 1] if verb == "prune" else []
        _, err = cli(verb, tmp_path / "bare", "--data", folder / "text.txt", *more, code=1)
        message, hint = err.splitlines()
        assert message.startswith(f"hf-lnscale: the folder '{tmp_path}/bare' has no tokenizer: no tokenizer.json")
        assert hint.endswith(f".save_pretrained('{tmp_path}/bare')")


def test_what_is_wrong_with_the_output_is_said_first(cli, folder, tmp_path):
    given = (folder / "plain", "--data", folder / "text.txt", "--out")
    _, err = cli("evaluate", *given, tmp_path / "x.txt", code=1)
    assert err.startswith(
        f"hf-lnscale: --out must be a file that ends in .json or .md, or an existing folder, got '{tmp_path}"
    )
    for verb, more in {"adopt": [], "diagnose": [], "prune": ["--layers", 1], "export": []}.items():
        given_here = [folder / "plain", "--out"] if verb == "export" else given
        _, err = cli(verb, *given_here, tmp_path / ("x" * 250), *more, code=1)
        assert err.startswith("hf-lnscale: --out 'x") or err.startswith(f"hf-lnscale: --out '{tmp_path}")
        assert "200 bytes" in err
    assert list(tmp_path.iterdir()) == []


def test_an_empty_text_is_said_before_anything_is_measured(cli, folder, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    _, err = cli("evaluate", folder / "plain", "--data", tmp_path / "empty.txt", code=1)
    assert err.splitlines()[0].startswith("hf-lnscale: --data 'empty.txt' contains no text")


@pytest.mark.slow
def test_tables_fit_into_80_columns(cli, folder, tmp_path, monkeypatch):
    for name in ("COLUMNS", "TERMINAL_WIDTH"):
        monkeypatch.setenv(name, "80")
    given = (folder / "plain", "--data", folder / "text.txt", "--seq-len", 32)
    monkeypatch.chdir(tmp_path)
    out, _ = cli("diagnose", *given, "--compare", folder / "plain", "--no-plots", "--out", "out")
    out += cli("evaluate", folder / "plain", *given, "--no-speed")[0]
    assert "│" in out
    assert [line for line in out.splitlines() if len(line) > 80] == []


def test_evaluate_the_current_folder(cli, folder, monkeypatch):
    monkeypatch.chdir(folder / "plain")
    found = json.loads(cli("evaluate", ".", "--data", folder / "text.txt", "--no-speed", "--seq-len", 32, "--json")[0])
    assert found["models"][0]["label"] == "plain"


def test_fold_points_to_export(cli):
    assert "hf-lnscale export MODEL --out DIR" in cli("fold", "model", "--out", "x", code=2)[1]


def test_interrupted(cli, monkeypatch):
    monkeypatch.setattr("hf_lnscale.commands.env.environment", lambda: (_ for _ in ()).throw(KeyboardInterrupt()))
    cli("env", code=130)


@pytest.mark.parametrize(
    "arguments",
    [["nothing"], ["info"], ["info", "x", "--no"], ["export", "x", "--out", "y", "--format", "onnx"], ["run"]],
)
def test_wrong_usage(arguments, cli):
    assert cli(*arguments, code=2)[1]


def test_warnings_and_messages_are_lines_and_nothing_is_left_behind(cli, monkeypatch):
    def speak():
        warnings.warn("take\ncare", UserWarning, stacklevel=1)
        logging.getLogger("hf_lnscale.somewhere").info("measuring")
        return {}

    before = (warnings.showwarning, transformers_logging.get_verbosity(), logging.getLogger("hf_lnscale").handlers[:])
    level = logging.getLogger("hf_lnscale").level
    monkeypatch.setattr("hf_lnscale.commands.info.one_line", lambda text: speak())
    monkeypatch.setattr("hf_lnscale.commands.env.environment", speak)
    _, err = cli("env", "--json")
    assert err == "hf-lnscale: warning: take\\ncare\nmeasuring\n"
    after = (warnings.showwarning, transformers_logging.get_verbosity(), logging.getLogger("hf_lnscale").handlers)
    assert after == before
    assert logging.getLogger("hf_lnscale").level == level


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "text", "value"),
    [
        (options.parse_layers, "12,14, 17", [12, 14, 17]),
        (options.parse_layers, "12-14,-1", [12, 13, 14, -1]),
        (options.parse_layers, "14-12", None),
        (options.parse_layers, "-3-5", None),
        (options.parse_layers, "1,,2", None),
        (options.parse_increase, "10%", 0.1),
        (options.parse_increase, "0.1", 0.1),
        (options.parse_increase, "150%", 1.5),
        (options.parse_increase, "10", None),
        (options.parse_increase, "nan", None),
        (options.parse_increase, "inf%", None),
        (options.parse_bytes, "4GiB", 4 * 2**30),
        (options.parse_bytes, "1.5 gb", 1_500_000_000),
        (options.parse_bytes, "1000", 1000),
        (options.parse_bytes, "4 gigs", None),
        (options.parse_bytes, "0", None),
        (options.parse_count, "1.1B", 1_100_000_000),
        (options.parse_count, "500M", 500_000_000),
        (options.parse_count, "-5", None),
    ],
)
def test_values(read, text, value):
    if value is None:
        with pytest.raises(typer.BadParameter, match="use "):
            read(text)
    else:
        assert read(text) == pytest.approx(value)


# --- verbs ------------------------------------------------------------------------------------------------------------


def test_env(cli):
    out, _ = cli("env")
    found = json.loads(cli("env", "--json")[0])
    assert found["flags"] is True
    assert found["packages"]["torch"] == metadata.version("torch")
    assert found["packages"]["transformers"] == tf.__version__
    installed = {one.metadata["Name"].lower().replace("_", "-") for one in metadata.distributions()}
    for name, version in found["packages"].items():
        assert (version is None) == (name not in installed)
    assert f"torch            {metadata.version('torch')}" in out
    assert "flags            on" in out


@pytest.mark.slow
def test_evaluate(cli, folder, tmp_path):
    given = (folder / "plain", folder / "plain", "--data", folder / "text.txt", "--no-speed", "--seq-len", 32)
    out, _ = cli("evaluate", *given)
    assert "perplexity" in out
    assert "±: standard error." in out
    out, err = cli("evaluate", *given, "--json", "--out", tmp_path / "found.md")
    found = json.loads(out)  # and nothing else is on stdout
    assert found["models"][1]["differences"]["perplexity"]["value"] == 0
    assert found["settings"]["data"]["stride"] == 16
    assert f"wrote {tmp_path / 'found.md'}" in err
    assert cli("evaluate", *given, "--markdown")[0].strip() == (tmp_path / "found.md").read_text().strip()


def test_export_to_gguf_without_a_converter(cli, folder, tmp_path, monkeypatch):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    _, err = cli("export", folder / "plain", "--out", tmp_path / "x.gguf", "--format", "gguf", code=1)
    assert "convert_hf_to_gguf.py, found neither by --converter or LLAMA_CPP nor on PATH" in err
    assert err.splitlines()[1].endswith("https://github.com/ggml-org/llama.cpp and use --converter llama.cpp")
    assert list(tmp_path.iterdir()) == []


def test_push_dry_run(cli, folder):
    out, _ = cli("push", folder / "plain", "me/model", "--dry-run")
    assert out.startswith("me/model: ")
    assert "  model.safetensors\n" in out
    found = json.loads(cli("push", folder / "plain", "me/model", "--dry-run", "--json")[0])
    assert found["files"]["model.safetensors"] == (folder / "plain" / "model.safetensors").stat().st_size
    assert found["card"] in out


NASTY = "[bold]<img src=x onerror=alert(1)> `a`|b\n# c\x1b[31m"


@pytest.mark.slow
def test_names_are_only_names(cli, folder, tmp_path):
    """A model and a text with names that are markup to rich, Markdown, HTML and terminals."""
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    inside = tmp_path / "[" / "x]"  # in a path, a closing tag
    inside.mkdir(parents=True)
    model, text, out = inside / NASTY, inside / f"{NASTY}.txt", inside / f"out {NASTY}"
    model.symlink_to(folder / "plain")
    text.write_bytes((folder / "text.txt").read_bytes())
    given = ("--data", text, "--seq-len", 32)
    shown = NASTY.replace("\n", "\\n").replace("\x1b", "\\x1b")
    printed = cli("info", model)[0]
    assert printed.startswith(f"{inside}/{shown}\n")
    printed += cli("prune", model, *given, "--drop", "1-2", "--heal", "none", "--out", out)[0]
    printed += cli("evaluate", model, *given, "--no-speed", "--out", tmp_path / "found.md")[0]
    printed += cli("diagnose", model, *given, "--no-plots", "--no-loss", "--out", tmp_path / "report")[0]
    printed += cli("push", out, "me/model", "--dry-run")[0]
    assert "\x1b" not in printed
    assert printed.count("[/x]") == 2
    for file in (out / "README.md", tmp_path / "found.md"):
        tokens = [
            one
            for token in parser.parse(file.read_text().split("---\n")[-1])
            for one in (token, *(token.children or []))
        ]
        assert not {"html_block", "html_inline", "link_open"} & {token.type for token in tokens}
        assert "<img src=x onerror=alert(1)>" in "".join(token.content for token in tokens if token.type == "text")
    html = (tmp_path / "report" / "report.html").read_text()
    assert "&lt;img src=x" in html
    assert "<img src=x" not in html


# --- a folder with a GGUF file in it ----------------------------------------------------------------------------------


def test_verbs_take_a_folder_with_a_gguf_file(cli, folder, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(folder / "plain")
    (tmp_path / "model").mkdir()
    pytest.importorskip("gguf")
    tiny.write_gguf(plain, tmp_path / "model" / "one.gguf")
    assert json.loads(cli("info", tmp_path / "model", "--json")[0])["num_layers"] == 4
    assert json.loads(cli("info", tmp_path / "model" / "one.gguf", "--json")[0])["model_type"] == "llama"
    given = ("--data", folder / "text.txt", "--seq-len", 64, "--no-speed", "--json")
    (found,) = json.loads(cli("evaluate", tmp_path / "model", *given)[0])["models"]
    assert found["size_on_disk"] == (tmp_path / "model" / "one.gguf").stat().st_size
    assert found["text"]["num_bytes"] == (folder / "text.txt").stat().st_size
    assert (
        "a GGUF file has no active ln_scaling" in cli("export", tmp_path / "model", "--out", tmp_path / "x", code=1)[1]
    )

    from hf_lnscale.checkpoints.names import load

    loaded = load(tmp_path / "model")
    torch.testing.assert_close(loaded(tiny.tokens()).logits, plain(tiny.tokens()).logits)
    loaded.save_pretrained(tmp_path / "saved")  # an ordinary model
    assert math.isclose(loaded.num_parameters(), plain.num_parameters())
    (tmp_path / "model" / "two.gguf").touch()
    assert "contains 2 GGUF files: one.gguf, two.gguf" in cli("info", tmp_path / "model", code=1)[1]
