"""The recipes, from the command line to a model that is loaded again."""

import os
import re
import signal
from pathlib import Path

import datasets
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, RwkvConfig, RwkvForCausalLM

import recipe
import tiny
from hf_lnscale import ln_scales
from hf_lnscale.core.display import with_error
from hf_lnscale.training.arguments import TeacherArguments
from hf_lnscale.training.scripts import import_recipe
from hf_lnscale.training.trainer import RecipeTrainer
from recipe import SMALL

pytestmark = pytest.mark.xdist_group("recipes")


@pytest.fixture(autouse=True)
def _no_shared_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A scaled and a Pre-LN checkpoint, texts and chats."""
    folder = tmp_path_factory.mktemp("recipes")
    recipe.save_model(folder / "scaled", ln_scaling=True)
    recipe.save_model(folder / "pre-ln")
    recipe.write_rows(folder / "text.jsonl", recipe.text_rows())
    recipe.write_rows(folder / "chat.jsonl", recipe.CHAT)
    pairs = [{"prompt": one["messages"][0]["content"], "completion": " yes" * 5} for one in recipe.CHAT]
    recipe.write_rows(folder / "pairs.jsonl", pairs)
    (folder / "text.txt").write_text("\n\n".join(row["text"] for row in recipe.text_rows()))
    return folder


def complete(folder: Path, plots: bool = True) -> None:
    found = {path.name for path in folder.iterdir()}
    assert {"README.md", "metrics.json", "trainer_state.json", "run.json", "tokenizer.json"} <= found
    assert {"loss.png", "depth.png"} <= found
    figures = recipe.metrics(folder)
    assert figures["perplexity"] == pytest.approx(torch.tensor(figures["eval_loss"]).exp().item(), rel=1e-5)
    assert figures["steps"] == 6
    assert min(figures[name] for name in ("tokens_per_second", "wall_seconds", "peak_memory_bytes")) > 0
    card = (folder / "README.md").read_text()
    assert figures["perplexity_stderr"] == pytest.approx(figures["perplexity"] * figures["eval_loss_stderr"])
    for name in ("eval_loss", "perplexity"):
        assert f"| {name.replace('_', ' ')} | {with_error(figures[name], figures[f'{name}_stderr'])} |" in card
    assert ".py " in card
    assert figures["versions"]["trl"] in card
    if (folder / "config.json").is_file():  # of an adapter, PEFT notes where its base lies
        assert not tiny.uploaded_that_say(folder.parent.parent, folder)


def eval_loss(model, reader, texts: list[str]) -> float:
    """Mean loss of the texts as one stream, cut into windows of 32."""
    ids = [id for text in texts for id in [*reader(text).input_ids, reader.eos_token_id]]
    total, count = 0.0, 0
    for start in range(0, len(ids), 32):
        window = torch.tensor([ids[start : start + 32]])
        if window.shape[1] > 1:
            with torch.no_grad():
                logits = model.eval().double()(window).logits
            loss = torch.nn.functional.cross_entropy(logits[0, :-1], window[0, 1:], reduction="sum")
            total, count = total + loss.item(), count + window.shape[1] - 1
    return total / count


@pytest.mark.slow
@pytest.mark.parametrize("ln_scaling", [True, False])
def test_pretrain(ln_scaling, tmp_path, here):
    held_out = recipe.text_rows(45)[40:]
    words = ["--num_hidden_layers", 4, "--hidden_size", 32, "--intermediate_size", 48, "--vocab_size", 300]
    words += ["--dataset_name", here / "text.jsonl", "--family", "qwen3", "--num_key_value_heads", 2, "--head_dim", 8]
    words += ["--eval_dataset_name", recipe.write_rows(tmp_path / "held_out.jsonl", held_out), *SMALL]
    words += ["--eval_samples", 5] if ln_scaling else ["--eval_samples", 5, "--no_ln_scaling"]
    assert recipe.run("pretrain", *words, "--output_dir", tmp_path / "out") == 0
    complete(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    reader = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.config.model_type == "qwen3"
    assert ln_scales(model) == (pytest.approx([1, 2**-0.5, 3**-0.5, 0.5]) if ln_scaling else [1.0] * 4)
    assert model.config.use_cache
    found = eval_loss(model, reader, [row["text"] for row in held_out])
    assert recipe.metrics(tmp_path / "out")["eval_loss"] == pytest.approx(found, rel=1e-5)
    assert recipe.metrics(tmp_path / "out")["tokens_seen"] == 6 * 2 * 32
    assert recipe.losses(tmp_path / "out")[-1] < recipe.losses(tmp_path / "out")[0]


@pytest.mark.slow
def test_pretrain_as_it_stands(tmp_path, monkeypatch):
    """No data, no tokenizer, no sizes named; a config by its name. On less of the text, as there is much of it."""
    monkeypatch.chdir(tmp_path)
    some = recipe.documents(standard_library=False)[:40]
    monkeypatch.setattr("hf_lnscale.measuring.sample.documents", lambda: some)
    assert recipe.run("pretrain", "--config", "small", *SMALL, "--max_steps", 6, "--output_dir", "out") == 0
    complete(tmp_path / "out")


@pytest.mark.slow
def test_continue_pretrain_with_the_warmup(tmp_path, here):
    words = ["--dataset_name", here / "text.txt", "--ln_scaling", "--ln_scaling_warmup_steps", 6, *SMALL]
    words += ["--model_name_or_path", here / "pre-ln", "--output_dir", tmp_path / "out"]
    with pytest.warns(UserWarning, match="converted models ended up worse"):
        assert recipe.run("continue_pretrain", *words) == 0
    complete(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert ln_scales(model) == pytest.approx([1, 2**-0.5, 3**-0.5, 0.5])


@pytest.mark.slow
def test_continue_pretrain_of_a_scaled_checkpoint_keeps_its_scale(tmp_path, here):
    """Also where --ln_scaling is given: it is led over already."""
    words = ["--dataset_name", here, "--model_name_or_path", here / "scaled", "--ln_scaling", *SMALL]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text((here / "text.txt").read_text())
    (tmp_path / "data" / "b.txt").write_text((here / "text.txt").read_text()[::-1])
    words[1] = tmp_path / "data"
    assert recipe.run("continue_pretrain", *words, "--output_dir", tmp_path / "out") == 0
    assert ln_scales(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))[3] == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("data", ["chat", "pairs", "parquet"])
def test_sft(data, tmp_path, here):
    words = ["--model_name_or_path", here / "scaled", "--chat_template_path", "chatml", *SMALL, "--max_length", 64]
    path = here / f"{data}.jsonl"
    if data == "parquet":
        path = tmp_path / "chat.parquet"
        datasets.Dataset.from_list(recipe.CHAT).to_parquet(path)
    assert recipe.run("sft", *words, "--dataset_name", path, "--output_dir", tmp_path / "out") == 0
    complete(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert ln_scales(model)[3] == 0.5
    if data != "pairs":
        assert "<|im_start|>" in AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


@pytest.mark.slow
@pytest.mark.usefixtures("no_plots")
def test_qlora(tmp_path, here):
    """On a CPU, an evaluation on the way would let no gradient through bitsandbytes' weights afterwards."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "num_key_value_heads": 4}
    recipe.save_model(tmp_path / "wide", ln_scaling=True, **sizes)
    words = ["--model_name_or_path", tmp_path / "wide", "--dataset_name", here / "pairs.jsonl", *SMALL, "--use_peft"]
    words += ["--load_in_4bit", "--lora_target_modules", "all-linear"]
    assert recipe.run("sft", *words, "--output_dir", tmp_path / "out") == 0
    assert recipe.losses(tmp_path / "out")[-1] < recipe.losses(tmp_path / "out")[0]
    evaluated = ["--eval_strategy", "steps", "--eval_steps", 1, "--output_dir", tmp_path / "evaluated"]
    assert recipe.run("sft", *words, *evaluated) == 0
    recipe.same_weights(tmp_path / "out", tmp_path / "evaluated")


@pytest.mark.slow
def test_heal_by_distillation_and_by_lora(tmp_path, here):
    common = [
        "--model_name_or_path",
        here / "scaled",
        "--drop_layers",
        1,
        "--dataset_name",
        here / "text.jsonl",
        *SMALL,
    ]
    words = [*common, "--learning_rate", 1e-3, "--teacher", here / "scaled", "--output_dir", tmp_path / "full"]
    assert recipe.run("heal", *words) == 0
    complete(tmp_path / "full")
    healed = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    assert healed.config.num_hidden_layers == 3
    assert ln_scales(healed) == pytest.approx([1, 3**-0.5, 0.5])
    # The divergence from the teacher is what falls.
    assert recipe.losses(tmp_path / "full")[-1] < recipe.losses(tmp_path / "full")[0]

    words = [*common, "--learning_rate", 1e-2, "--teacher", here / "scaled", "--use_peft"]
    assert recipe.run("heal", *words, "--output_dir", tmp_path / "lora") == 0
    complete(tmp_path / "lora")
    assert recipe.losses(tmp_path / "lora")[-1] < recipe.losses(tmp_path / "lora")[0]
    base = AutoModelForCausalLM.from_pretrained(here / "scaled", drop_layers=[1])
    adapted = PeftModel.from_pretrained(base, tmp_path / "lora")
    assert ln_scales(adapted) == pytest.approx([1, 3**-0.5, 0.5])


@pytest.mark.slow
@pytest.mark.parametrize("control", [False, True])
def test_the_adapter_of_a_healed_cut_names_the_cut_as_its_base(control, tmp_path, here):
    """And not the whole model, which gets an adapter too if it is trained as a control."""
    cut = AutoModelForCausalLM.from_pretrained(here / "scaled", drop_layers=[1])
    with torch.no_grad():  # as if healed: dropping the layer again would not give these weights
        cut.get_parameter("model.layers.0.mlp.down_proj.weight").mul_(1.5)
    for one in (cut, AutoTokenizer.from_pretrained(here / "scaled")):
        one.save_pretrained(tmp_path / "cut")
    words = ["--model_name_or_path", tmp_path / "cut", "--dataset_name", here / "text.jsonl", *SMALL, "--use_peft"]
    words += ["--whole", here / "scaled", "--control"] if control else ["--teacher", here / "scaled"]
    assert recipe.run("heal", *words, "--output_dir", tmp_path / "out") == 0
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert adapted.peft_config["default"].base_model_name_or_path == str(tmp_path / "cut")
    base = adapted.unload()
    assert all(torch.equal(part, base.get_parameter(name)) for name, part in cut.named_parameters())


@pytest.mark.slow
def test_streaming(tmp_path, here):
    words = ["--dataset_name", here / "text.txt", "--dataset_streaming", "--model_name_or_path", here / "scaled"]
    assert recipe.run("continue_pretrain", *words, *SMALL, "--eval_samples", 1, "--output_dir", tmp_path / "out") == 0
    complete(tmp_path / "out")


# --- resuming -------------------------------------------------------------------------------------------------------


WAYS = {
    "full, layers dropped": ("continue_pretrain", ["--drop_layers", "1", "--gradient_accumulation_steps", "1"]),
    "lora, layers dropped": ("continue_pretrain", ["--drop_layers", "1", "--use_peft"]),
    "distillation": ("heal", ["--drop_layers", "1", "--teacher", "scaled"]),
    "distillation, lora": ("heal", ["--drop_layers", "1", "--teacher", "scaled", "--use_peft"]),
    "streaming": ("continue_pretrain", ["--dataset_streaming", "--eval_samples", "1"]),
    "warmup half-way": ("continue_pretrain", ["--ln_scaling", "--ln_scaling_warmup_steps", "5"]),
}


@pytest.fixture
def no_plots(monkeypatch):
    """Half of the time of a run of this size."""
    monkeypatch.setattr("hf_lnscale.training.run_report._plot", lambda *told: [])


@pytest.mark.slow
@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_is_stopped_and_resumed_is_the_run_that_was_not(way, tmp_path, here, monkeypatch, capsys):
    name, words = WAYS[way]
    words = [str(here / "scaled") if word == "scaled" else word for word in words]
    model = "pre-ln" if "warmup" in way else "scaled"
    words = ["--model_name_or_path", here / model, "--dataset_name", here / "text.jsonl", *SMALL, *words]
    assert recipe.run(name, *words, "--output_dir", tmp_path / "whole") == 0

    words += ["--output_dir", tmp_path / "stopped"]
    number = signal.SIGINT if way == "distillation" else signal.SIGTERM
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        recipe.signal_after(3, number, patch)
        assert recipe.run(name, *words) == 128 + number
    assert signal.getsignal(number) is before
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{name}: stopped by {number.name} after step 3" in said
    assert said.endswith("--resume_from_checkpoint true")
    assert not (tmp_path / "stopped" / "metrics.json").exists()

    assert recipe.run(name, *words, "--resume_from_checkpoint", "true") == 0
    recipe.same_weights(tmp_path / "whole", tmp_path / "stopped")
    assert recipe.losses(tmp_path / "stopped") == recipe.losses(tmp_path / "whole")
    whole, stopped = recipe.metrics(tmp_path / "whole"), recipe.metrics(tmp_path / "stopped")
    assert stopped["resumed_from"].endswith("checkpoint-3")
    for figure in ("eval_loss", "tokens_seen", "steps"):
        assert stopped[figure] == whole[figure], figure


@pytest.mark.slow
@pytest.mark.usefixtures("no_plots")
def test_pretrain_goes_on_with_the_tokenizer_that_it_trained(tmp_path, here, monkeypatch):
    words = ["--num_hidden_layers", 2, "--vocab_size", 300, "--dataset_name", here / "text.jsonl", *SMALL]
    assert recipe.run("pretrain", *words, "--output_dir", tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        recipe.signal_after(2, signal.SIGTERM, patch)
        assert recipe.run("pretrain", *words, "--output_dir", tmp_path / "stopped") == 143
    # "true" in a folder that holds no run yet starts one: the same command line each time, on machines that go away.
    assert recipe.run("pretrain", *words, "--output_dir", tmp_path / "new", "--resume_from_checkpoint", "true") == 0
    with monkeypatch.context() as patch:
        patch.setattr(import_recipe("pretrain"), "train_tokenizer", None)
        done = recipe.run("pretrain", *words, "--output_dir", tmp_path / "stopped", "--resume_from_checkpoint", "true")
        assert done == 0
    for folder in ("stopped", "new"):
        recipe.same_weights(tmp_path / "whole", tmp_path / folder)


# --- wrong input ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wrong(here):
    recipe.write_rows(here / "other.jsonl", [{"content": "some text"}] * 9)
    (here / "empty.jsonl").write_text("")
    (here / "empty.txt").write_text("")
    sizes = {"num_hidden_layers": 2, "hidden_size": 8, "attention_hidden_size": 8}
    RwkvForCausalLM(RwkvConfig(**sizes, vocab_size=300)).save_pretrained(here / "rwkv")
    recipe.tokenizer().save_pretrained(here / "rwkv")
    recipe.save_model(here / "wide", hidden_size=64)
    other = recipe.tokenizer()
    other.add_tokens(["<more>"])
    AutoModelForCausalLM.from_pretrained(here / "scaled").save_pretrained(here / "more-tokens")
    other.save_pretrained(here / "more-tokens")
    recipe.write_rows(here / "number.jsonl", [{"text": 1}] * 9)
    (here / "broken.jsonl").write_text('{"text": "some text"}\n{"text"\n')
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    recipe.write_rows(here / "calls.jsonl", [{"messages": [{"role": "user", "content": "go"}, call]}] * 9)
    (here / "an-adapter").mkdir()
    (here / "an-adapter" / "adapter_config.json").write_text("{}")
    return here


BAD = {
    "column": ("continue_pretrain", "--dataset_name other.jsonl", r"no column 'text'; it has content"),
    "empty": ("continue_pretrain", "--dataset_name empty.jsonl", r"'.*empty\.jsonl' is empty"),
    "empty text": ("continue_pretrain", "--dataset_name empty.txt", r"'.*empty\.txt' is empty"),
    "no file": ("continue_pretrain", "--dataset_name no.jsonl", r"no file '.*no\.jsonl'"),
    "no template": ("sft", "--dataset_name chat.jsonl", r"has no chat template; name one with --chat_template_path"),
    "unmarked": ("sft", "--dataset_name chat.jsonl --chat_template_path plain.jinja", r"does not mark the assistant's"),
    "long prompts": (
        "sft",
        "--dataset_name chat.jsonl --chat_template_path chatml --max_length 4",
        r"36 of 36 rows have",
    ),
    "text for sft": ("sft", "--dataset_name text.jsonl", r"columns text; sft\.py reads 'messages'.*continue_pretrain"),
    "family": ("continue_pretrain", "--model_name_or_path rwkv", r"model_type 'rwkv': its layers do not all have"),
    "no checkpoint": ("continue_pretrain", "--model_name_or_path /nowhere/x", r"there is no folder '/nowhere/x'"),
    "no such name": (
        "continue_pretrain",
        "--model_name_or_path no-such/model",
        r"model_name_or_path: cannot read 'no-such/model': .*offline mode",
    ),
    "no model": ("continue_pretrain", "", r"name the checkpoint to train"),
    "long warmup": (
        "continue_pretrain",
        "--model_name_or_path pre-ln --ln_scaling --ln_scaling_warmup_steps 7",
        r"only 6",
    ),
    "layer": ("continue_pretrain", "--drop_layers 9", r"layer 9 does not exist"),
    "layers": ("continue_pretrain", "--drop_layers 1 x", r"neither layer indices nor"),
    "unpruned": ("heal", "", r"has all its layers; use --drop_layers"),
    "teacher": (
        "heal",
        "--drop_layers 1 --teacher more-tokens",
        r"more-tokens' \(301 tokens\) differs from the student's \(300 tokens\)",
    ),
    "another loss": ("heal", "--drop_layers 1 --teacher scaled --loss_type dft", r"loss_type .* cannot be combined"),
    "number": (
        "continue_pretrain",
        "--dataset_name number.jsonl",
        r"'text' of line 1 .* is 1, which is not text",
    ),
    "broken": ("continue_pretrain", "--dataset_name broken.jsonl", r"line 2 of 'broken\.jsonl' is not JSON"),
    "short stream": ("continue_pretrain", "--dataset_streaming --eval_samples 40", r"none are left to train on"),
    "tool call": ("sft", "--dataset_name calls.jsonl --chat_template_path silent.jinja", r"drops tool calls, which"),
    "adapter": ("continue_pretrain", "--model_name_or_path an-adapter", r"is an adapter, not a model\. Merge it first"),
    "no rate": ("pretrain", "--config_name scaled", r"learning_rate: required with --config_name"),
    "no state": ("continue_pretrain", "--resume_from_checkpoint scaled", r"has no complete trainer_state\.json"),
    "4 bit": ("sft", "--dataset_name pairs.jsonl --load_in_4bit", r"add --use_peft"),
    "option": ("sft", "--learnin_rate 1", r"learnin_rate"),
    "config": ("sft", "--config nowhere", r"no file 'nowhere'; configs shipped with sft are .*qwen3-8b"),
    "checkpoint": ("continue_pretrain", "--resume_from_checkpoint /nowhere", r"there is no folder '/nowhere'"),
    "shape": ("pretrain", "--hidden_size 30", r"hidden_size 30 is not a multiple of num_attention_heads 4"),
    "no family": ("pretrain", "--family xlnet", r"model_type of a family that can be scaled .* 'xlnet'"),
    "post-norm": ("pretrain", "--family olmo2", r"family must be .*, got 'olmo2'"),
    "other sizes": ("pretrain", "--family gpt2", r"family 'gpt2' has no intermediate_size in its configuration"),
    "eval_samples": ("continue_pretrain", "--eval_samples 0", r"eval_samples must be at least 1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD)
def test_wrong_input_is_one_line_before_training(case, tmp_path, wrong, capsys):
    (wrong / "plain.jinja").write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    marked = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
    (wrong / "silent.jinja").write_text(marked)
    name, words, said = BAD[case]
    words = [str(wrong / word) if (wrong / word).exists() or word == "no.jsonl" else word for word in words.split()]
    if "--model_name_or_path" not in words and name != "pretrain" and case != "no model":
        words = ["--model_name_or_path", wrong / "scaled", *words]
    if "--dataset_name" not in words:
        words = ["--dataset_name", wrong / "text.jsonl", *words]
    # Later words count, and some of SMALL's are the wrong ones here.
    small = [*SMALL[: SMALL.index("--learning_rate")], *SMALL[SMALL.index("--learning_rate") + 2 :]]
    assert recipe.run(name, *(small if case == "no rate" else SMALL), *words, "--output_dir", tmp_path / "out") == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"{name}: ")
    assert re.search(said, line), line
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@pytest.mark.slow
@pytest.mark.usefixtures("no_plots")
def test_a_folder_belongs_to_one_run(tmp_path, here, capsys):
    common = ["--dataset_name", here / "text.jsonl", *SMALL, "--max_steps", 1, "--output_dir", tmp_path / "out"]
    words = ["--model_name_or_path", here / "scaled", *common]

    def refused(name, *words):
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
        assert recipe.run(name, *words) == 1
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
        return capsys.readouterr().err.strip().splitlines()[-1]

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    assert "is not empty and was not created by a recipe" in refused("continue_pretrain", *words)
    (tmp_path / "out" / "thesis.tex").unlink()
    assert recipe.run("continue_pretrain", *words) == 0
    assert "already contains this run; continue it with --resume" in refused("continue_pretrain", *words)
    resume = ["--resume_from_checkpoint", "true"]
    assert "whose recipe is 'continue_pretrain'" in refused("heal", *words, *resume)
    other = refused("continue_pretrain", "--model_name_or_path", here / "pre-ln", *common, *resume)
    assert f"whose model_name_or_path is '{here / 'scaled'}'" in other
    assert "whose max_length is 32" in refused("continue_pretrain", *words, "--max_length", 16, *resume)
    # The schedule of the optimizer is part of a checkpoint: another rate would be told, and not be taken.
    assert "whose learning_rate is 0.01" in refused("continue_pretrain", *words, "--learning_rate", 1e-5, *resume)
    assert "whose batch is 2" in refused("continue_pretrain", *words, "--gradient_accumulation_steps", 2, *resume)


@pytest.mark.slow
@pytest.mark.usefixtures("no_plots")
def test_what_to_resume(tmp_path, here, capsys):
    """The last checkpoint that is complete, or one under any name; options are the same in YAML and as words."""
    words = ["--model_name_or_path", here / "scaled", "--dataset_name", here / "text.jsonl", *SMALL, "--save_steps", 2]
    (tmp_path / "config.yaml").write_text("drop_layers: [1]\n")
    yaml = ["--config", tmp_path / "config.yaml", *words]
    assert recipe.run("continue_pretrain", *yaml, "--output_dir", tmp_path / "whole") == 0
    (tmp_path / "whole" / "checkpoint-4").rename(tmp_path / "best")
    named = ["--output_dir", tmp_path / "named", "--resume_from_checkpoint", tmp_path / "best"]
    assert recipe.run("continue_pretrain", *yaml, *named) == 0
    recipe.same_weights(tmp_path / "whole", tmp_path / "named")

    (tmp_path / "best").rename(tmp_path / "whole" / "checkpoint-4")
    (tmp_path / "whole" / "checkpoint-6" / "trainer_state.json").write_text("")  # killed while it was written
    weights = tmp_path / "whole" / "model.safetensors"
    weights.unlink()
    again = [*words, "--drop_layers", 1, "--output_dir", tmp_path / "whole", "--resume_from_checkpoint", "true"]
    assert recipe.run("continue_pretrain", *again) == 0
    assert "checkpoint-6, which is incomplete" in capsys.readouterr().err
    assert recipe.metrics(tmp_path / "whole")["resumed_from"] == "checkpoint-4"
    recipe.same_weights(tmp_path / "whole", tmp_path / "named")


@pytest.mark.slow
@pytest.mark.usefixtures("no_plots")
def test_a_signal_after_the_last_step_stops_nothing(tmp_path, here, monkeypatch):
    """No checkpoint is written any more, and the model is."""
    original = RecipeTrainer.evaluate

    def evaluate(self, *args, **kwargs):
        if self.state.global_step == 6:
            if not done:  # the last one while training; then comes that of the report
                os.kill(os.getpid(), signal.SIGTERM)
            done.append(1)
        return original(self, *args, **kwargs)

    done = []
    monkeypatch.setattr(RecipeTrainer, "evaluate", evaluate)
    words = ["--model_name_or_path", here / "scaled", "--dataset_name", here / "text.jsonl", *SMALL]
    words += ["--save_strategy", "no", "--eval_strategy", "steps", "--eval_steps", 6]
    assert recipe.run("continue_pretrain", *words, "--output_dir", tmp_path / "out") == 0
    assert len(done) == 2
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 4


def test_no_teacher_in_place_of_the_config_s():
    assert TeacherArguments(teacher="none").teacher is None
    assert TeacherArguments(teacher="").teacher is None
    assert TeacherArguments(teacher="nonesuch").teacher == "nonesuch"


@pytest.mark.parametrize(
    ("given", "whole"),
    [({"teacher": "a"}, "a"), ({"teacher": "a", "whole": "none"}, None), ({"whole": "b"}, "b"),
     ({"whole": "b", "control": True, "self_data": 9}, "b")],
)  # fmt: skip
def test_zero_3_is_refused_where_a_model_does_not_train(given, whole, monkeypatch):
    """DeepSpeed would shard it in `from_pretrained`."""
    assert TeacherArguments(**given).whole_model("pruned", None) == whole
    monkeypatch.setattr("hf_lnscale.training.arguments.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="ZeRO-3 would shard a model that does not train"):
        TeacherArguments(**given).whole_model("pruned", None)
    assert TeacherArguments(whole="b", control=True).whole_model("pruned", None) == "b"
