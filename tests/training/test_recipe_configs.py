"""Every config that comes with a recipe is one that the recipe, or accelerate, can read."""

import re

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from transformers import LlamaForCausalLM
from trl.scripts.utils import DatasetConfig

import recipe
from hf_lnscale.core.families import FAMILIES
from hf_lnscale.training.arguments import PretrainArguments
from hf_lnscale.training.recipe_model import new_config
from hf_lnscale.training.scripts import RECIPES, import_recipe

CONFIGS = sorted((recipe.RECIPES / "configs").glob("*/*.yaml"))
ACCELERATE = sorted((recipe.RECIPES / "accelerate").glob("*.yaml"))
MODELS = [
    "smollm2-135m",
    "smollm2-1.7b",
    "llama-3.2-1b",
    "llama-3.1-8b",
    "qwen2.5-0.5b",
    "qwen2.5-7b",
    "qwen3-0.6b",
    "qwen3-8b",
    "small",
]


class ParsedError(Exception):
    pass


def parsed(monkeypatch, name, *words):
    """What a recipe understands: its arguments, the training's first."""

    def stop(recipe, training, *told):
        raise ParsedError(training, *told)

    monkeypatch.setattr(import_recipe(name), "Run", stop)
    with pytest.raises(ParsedError) as found:
        recipe.run(name, *words)
    return found.value.args


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_config(path, monkeypatch):
    name = path.parent.name
    assert name in RECIPES.values()
    training, *told = parsed(monkeypatch, name, "--config", path.stem)
    said = yaml.safe_load(path.read_text())
    for key, value in said.items():
        (part,) = [part for part in (training, *told) if hasattr(part, key)]
        given = getattr(part, key)
        if key == "lora_target_modules" and len(value) == 1:
            value = value[0]  # as TRL does
        if key == "drop_layers":
            value = [str(layer) for layer in value]  # as on the command line
        if key == "datasets":
            value = [DatasetConfig(**part) for part in value]
        assert given == value or str(getattr(given, "value", given)) == str(value), key
    assert training.output_dir.startswith("runs/")
    assert path.read_text().startswith("#")  # where the values come from
    # The command line overrides the file.
    training, *_ = parsed(monkeypatch, name, "--config", str(path), "--learning_rate", "0.125", "--output_dir", "other")
    assert (training.learning_rate, training.output_dir) == (0.125, "other")


@pytest.mark.parametrize(("shape", "learning_rate"), [("130M", 1e-3), ("350M", 1e-3), ("1B", 5e-4)])
def test_the_paper_s_learning_rate_goes_with_its_shapes(shape, learning_rate, monkeypatch):
    training, *_ = parsed(monkeypatch, "pretrain", "--shape", shape)
    assert training.learning_rate == learning_rate
    training, *_ = parsed(monkeypatch, "pretrain", "--shape", shape, "--learning_rate", "0.5")
    assert training.learning_rate == 0.5


def test_there_is_a_config_of_every_recipe_for_every_model():
    for name in ("continue_pretrain", "sft", "heal"):
        assert {path.stem for path in CONFIGS if path.parent.name == name} - {"mixture"} == set(MODELS)
    shapes = {path.stem for path in CONFIGS if path.parent.name == "pretrain"}
    assert shapes == {"130m", "250m", "350m", "1b", "7b", "small", "modern"}
    assert {"llama", "qwen2", "qwen3"} <= set(FAMILIES)  # the families of these models


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_config(path):
    config = load_config_from_file(str(path))  # refuses keys that it does not know
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "recipe.py"])
    for key in {**config.fsdp_config, **config.deepspeed_config}:
        assert hasattr(arguments, key), key  # it lets these pass, whatever they are
    arguments, _, _ = _validate_launch_command(arguments)
    assert arguments.num_processes == config.num_processes
    kind = (
        "use_fsdp" if "fsdp" in path.stem or "nodes" in path.stem else "use_deepspeed" if "zero" in path.stem else None
    )
    assert (arguments.use_fsdp, arguments.use_deepspeed) == (kind == "use_fsdp", kind == "use_deepspeed")


@pytest.mark.parametrize("name", sorted(RECIPES.values()))
def test_a_recipe_opens_with_the_command_lines_that_run_it(name, monkeypatch):
    """And each of them is one: its options exist."""
    text = (recipe.RECIPES / f"{name}.py").read_text()
    assert len(text.splitlines()) < 110
    opening = text.split('"""')[1].replace("\\\n", " ")
    lines = re.findall(rf"recipes/{name}\.py (.+)", opening)
    assert len(lines) >= 3
    for line in lines:
        words = [word for word in line.split() if word != "..."]
        words = [str(recipe.RECIPES.parent / word) if word.startswith("recipes/") else word for word in words]
        parsed(monkeypatch, name, *words)


@pytest.mark.parametrize("page", ["docs/recipes.md", "recipes/README.md"])
def test_the_commands_in_the_docs_are_some(page, monkeypatch):
    text = (recipe.RECIPES.parent / page).read_text().replace("\\\n", " ")
    found = re.findall(
        r"(?:hf-lnscale train |recipes/)(pretrain|continue_pretrain|continue|sft|heal)(?:\.py)? (--.+)", text
    )
    assert len(found) >= 4
    for name, line in found:
        words = [word for word in line.split("#")[0].split() if not word.startswith("...")]
        if "--help" not in words:
            parsed(monkeypatch, RECIPES.get(name, name), *words)


@pytest.mark.parametrize(("shape", "hidden", "mlp", "heads", "layers"), [
    ("130M", 768, 2048, 12, 12), ("250M", 768, 2560, 16, 24), ("350M", 1024, 2736, 16, 24), ("1B", 2048, 5461, 32, 24),
    ("7B", 4096, 11008, 32, 32),
])  # fmt: skip
def test_shapes_are_the_paper_s(shape, hidden, mlp, heads, layers):
    """arXiv 2502.05795, the table of model sizes."""
    config = new_config(recipe.tokenizer(), PretrainArguments(shape=shape), max_length=256)
    assert (config.hidden_size, config.intermediate_size) == (hidden, mlp)
    assert (config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers) == (heads, heads, layers)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    embeddings = 2 * config.vocab_size * hidden
    assert model.num_parameters() == embeddings + layers * (4 * hidden**2 + 3 * hidden * mlp + 2 * hidden) + hidden


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.parent.name == "heal" and path.stem != "small"])
def test_healing_learns_from_the_whole_model_by_adapters(path, monkeypatch):
    _, teacher, checkpoint, *_ = parsed(monkeypatch, "heal", "--config", str(path))
    assert teacher.teacher == checkpoint.model_name_or_path
    assert checkpoint.use_peft
    # What the header says of training in full.
    training, _, checkpoint, *_ = parsed(
        monkeypatch, "heal", "--config", str(path), "--use_peft", "false", "--learning_rate", "1e-4"
    )
    assert (checkpoint.use_peft, training.learning_rate) == (False, 1e-4)
