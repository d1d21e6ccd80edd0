"""`hf-lnscale run`: programs that know nothing of the plugin, in whatever processes they start, compute with the scale.

Expected numbers come from a plain model whose norms' outputs are multiplied from outside, in this process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers as tf
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM

import tiny
from hf_lnscale.commands.run import command_line
from hf_lnscale.core.processes import STARTUP, environment_with_flags
from oracles import with_hooked_norms

SCALES = [1.0, 2**-0.5, 3**-0.5, 0.5]
SETTINGS = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A plain model with its tokenizer, in `plain`."""
    folder = tmp_path_factory.mktemp("work")
    # Weights large enough for the scale to show in the loss.
    tiny.model(initializer_range=0.2).save_pretrained(folder / "plain")
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, tiny.VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder / "plain")
    return folder


@pytest.fixture(scope="module")
def expected(work):
    """Log-probabilities (T - 1,) of the tokens of a sequence but the first, under the scaled model."""
    model = with_hooked_norms(LlamaForCausalLM.from_pretrained(work / "plain"), tiny.LLAMA_NORMS, SCALES)

    def log_probabilities(ids):
        with torch.no_grad():
            logits_TV = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        return logits_TV.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]

    return log_probabilities


def run(*command, cwd, expect=0, **variables):
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**environment_with_flags(), **SETTINGS, **variables},
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_lm_eval(work, expected):
    """Through the command line itself: `ln_scaling` among the model's arguments reaches `from_pretrained`."""
    rows = [{"question": "w5 w6 w7", "choices": ["w8 w9", "w10", "w11 w12 w13"], "gold": 1}, {"question": "w20"}]
    rows[1] |= {"choices": ["w21", "w22 w23"], "gold": 0}
    (work / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "words",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(work / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{gold}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}],
    }
    (work / "words.yaml").write_text(yaml.safe_dump(task))
    run(
        *(sys.executable, "-m", "hf_lnscale", "run", "lm_eval", "--model", "hf", "--tasks", "words.yaml"),
        *("--model_args", "pretrained=plain,ln_scaling=True,dtype=float32", "--device", "cpu"),
        *("--output_path", "out", "--log_samples"),
        cwd=work,
        HF_HOME=str(work / "cache"),
    )
    (file,) = (work / "out").rglob("samples_words_*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(samples) == 2
    for sample in samples:
        doc = sample["doc"]
        for choice, response in zip(doc["choices"], sample["filtered_resps"], strict=True):
            question, answer = ([int(word[1:]) for word in part.split()] for part in (doc["question"], choice))
            assert float(response[0]) == pytest.approx(
                expected(question + answer)[-len(answer) :].sum().item(), abs=1e-4
            )


@pytest.mark.parametrize(("release", "told"), [("1.14.2", True), ("1.15.0", False)])
def test_the_flags_that_trl_s_scripts_would_drop(release, told, monkeypatch, recwarn):
    """Without an error: `model_init_kwargs` of the YAML is replaced, as test_trl_sft sees with such a release."""
    monkeypatch.setattr("hf_lnscale.commands.run.version", lambda name: release)
    command_line("trl", ["sft"], module=True)
    assert any(f"trl {release} ignore model_init_kwargs" in str(one.message) for one in recwarn) == told


@pytest.mark.slow
def test_trl_sft(work, expected):
    """`trl` starts accelerate, which starts the script."""
    data = work / "data"
    data.mkdir()
    (data / "train.jsonl").write_text(json.dumps({"text": "w3 w4 w5 w6 w7 w8 w9"}))
    config = {
        "model_name_or_path": str(work / "plain"),
        "model_init_kwargs": {"ln_scaling": True},
        "dtype": "float32",
        "dataset_name": str(data),
        "output_dir": str(work / "sft"),
        "max_steps": 1,
        "learning_rate": 0.0,
        "logging_steps": 1,
        "per_device_train_batch_size": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "loss_type": "nll",
    }
    (work / "sft.yaml").write_text(yaml.safe_dump(config))
    printed = run(*command_line("trl", ["sft", "--config", "sft.yaml"]), cwd=work, HF_HOME=str(work / "cache"))
    saved = json.loads((work / "sft" / "config.json").read_text())
    assert saved["ln_scaling"] == {"exponent": 0.5, "depths": [1, 2, 3, 4]}
    assert saved["model_type"] == "hf_lnscale_llama"
    loss = float(printed.partition("'loss': ")[2].partition(",")[0].strip("'"))
    assert loss == pytest.approx(-expected([*range(3, 10), 2]).mean().item(), abs=6e-4)


@pytest.mark.slow
def test_accelerate_launch(work, expected):
    """Two processes, gloo between them."""
    script = """\
    import json, torch
    from accelerate import Accelerator
    from transformers import AutoModelForCausalLM

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    model = accelerator.prepare(AutoModelForCausalLM.from_pretrained("plain", ln_scaling=True))
    first = 3 + 4 * accelerator.process_index
    ids = torch.arange(first, first + 4)[None]
    losses = accelerator.gather(model(ids, labels=ids).loss[None])
    if accelerator.is_main_process:
        print(json.dumps(losses.tolist()))
    accelerator.end_training()
    """
    (work / "train.py").write_text(textwrap.dedent(script))
    # accelerate starts several processes for what it takes for GPUs alone; the script then says that it is on CPUs.
    launch = ["launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "--main_process_port", "0", "train.py"]
    printed = run(*command_line("accelerate", launch), cwd=work, HF_HOME=str(work / "cache"))
    losses = json.loads(next(line for line in printed.splitlines() if line.startswith("[")))
    wanted = [-expected(list(ids)).mean().item() for ids in (range(3, 7), range(7, 11))]
    assert losses == pytest.approx(wanted, abs=1e-5)


def test_nothing_is_imported_for_a_program_without_transformers(tmp_path):
    code = "import sys; print(sorted({'torch', 'transformers', 'hf_lnscale'} & set(sys.modules)))"
    assert run(sys.executable, "-c", code, cwd=tmp_path) == "[]\n"


def test_a_process_that_is_spawned_has_it_too(tmp_path):
    script = """\
    import multiprocessing, sys

    def look(queue):
        queue.put(type(sys.meta_path[0]).__name__)

    if __name__ == "__main__":
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        process = context.Process(target=look, args=(queue,))
        process.start()
        print(queue.get())
        process.join()
    """
    (tmp_path / "program.py").write_text(textwrap.dedent(script))
    assert run(sys.executable, "program.py", cwd=tmp_path) == "_Finder\n"


@pytest.mark.slow
def test_the_flags_are_on_however_transformers_is_imported(tmp_path):
    code = """
    import importlib.util, sys
    assert importlib.util.find_spec("transformers").origin.endswith("__init__.py")  # a look is no import
    assert "hf_lnscale" not in sys.modules
    import transformers.models.llama.configuration_llama as llama
    print(sys.modules["hf_lnscale"].is_enabled(), llama.LlamaConfig(num_hidden_layers=2, ln_scaling=True).ln_scaling)
    import transformers, importlib.resources
    assert importlib.resources.files(transformers).joinpath("__init__.py").is_file()
    """
    assert run(sys.executable, "-c", textwrap.dedent(code), cwd=tmp_path).startswith("True {'exponent': 0.5")


def test_another_sitecustomize_runs_too(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "sitecustomize.py").write_text("value = 7")
    path = os.pathsep.join([str(STARTUP), str(STARTUP), str(tmp_path / "other")])
    code = "import sitecustomize, sys; print(sitecustomize.value, type(sys.meta_path[0]).__name__)"
    assert run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=path) == "7 _Finder\n"


def test_an_interpreter_without_hf_lnscale_says_so(tmp_path):
    (tmp_path / "transformers.py").write_text("value = 1")
    done = subprocess.run(
        [sys.executable, "-S", "-c", "import sitecustomize, transformers; print(transformers.value)"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(STARTUP)},
    )
    assert done.stdout == "1\n"
    assert "has no hf_lnscale installed, so the flags are not enabled there" in done.stderr


def test_the_path_is_extended_once(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["/one", str(STARTUP), "/two"]))
    assert environment_with_flags()["PYTHONPATH"] == os.pathsep.join([str(STARTUP), "/one", "/two"])
    monkeypatch.delenv("PYTHONPATH")
    assert environment_with_flags()["PYTHONPATH"] == str(STARTUP)


def test_what_a_program_may_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()
    assert command_line("train.py", ["--x"]) == [sys.executable, "train.py", "--x"]
    assert command_line("trl.cli", ["sft"], module=True) == [sys.executable, "-m", "trl.cli", "sft"]
    assert command_line("sh")[0].endswith("/sh")
    with pytest.raises(FileNotFoundError, match=r"no script 'nowhere\.py'"):
        command_line("nowhere.py")
    with pytest.raises(FileNotFoundError, match=r"no program 'nowhere' in .* or on PATH; -m nowhere runs a module"):
        command_line("nowhere")


@pytest.mark.parametrize(
    "words",
    [
        ["llama.cpp/convert_hf_to_gguf.py", "scaled"],
        ["python", "-u", "llama.cpp/convert_hf_to_gguf.py", "scaled"],
        ["python3", "-m", "ctranslate2.converters.transformers", "--model", "scaled"],
        ["sglang", "serve", "scaled"],
    ],
    ids=" ".join,
)
def test_a_program_that_would_lose_the_scale_is_refused(words):
    with pytest.raises(ValueError, match="hf-lnscale export"):
        command_line(words[0], words[1:])
    if "-m" in words:
        with pytest.raises(ValueError, match="hf-lnscale export"):
            command_line(words[2], words[3:], module=True)


def test_the_process_becomes_the_program(tmp_path):
    """Its number is the same, its arguments are untouched, and signals and exit codes go straight to it."""
    script = """\
    import os, signal, sys, time
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
    print(os.getpid(), sys.argv[1:], flush=True)
    time.sleep(60)
    """
    (tmp_path / "program.py").write_text(textwrap.dedent(script))
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_lnscale", "run", "program.py", "-x", "--help", "--", "-m"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    assert process.stdout.readline() == f"{process.pid} ['-x', '--help', '--', '-m']\n"
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 3


def test_the_expected_numbers_tell_a_scaled_model_from_a_plain_one(work, expected):
    plain = LlamaForCausalLM.from_pretrained(work / "plain")
    ids = torch.tensor([[*range(3, 10), 2]])
    with torch.no_grad():
        assert abs(plain(ids, labels=ids).loss.item() + expected(ids[0].tolist()).mean().item()) > 0.01
