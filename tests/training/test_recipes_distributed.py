"""`accelerate launch` on two CPU processes, once for all: DDP and FSDP2 do what one process does with the same data."""

import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from torch.distributed import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

import processes
import recipe
from hf_lnscale import ln_scales
from recipe import SMALL

TESTS = Path(__file__).parents[1]

pytestmark = [pytest.mark.xdist_group("recipes"), pytest.mark.slow]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launched")
    recipe.save_model(folder / "scaled", ln_scaling=True, attention_dropout=0.0)
    recipe.write_rows(folder / "text.jsonl", recipe.text_rows())
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", processes.free_port()]
    command += ["--config_file", recipe.RECIPES / "accelerate" / "cpu.yaml", TESTS / "recipes_in_two_processes.py"]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*map(str, command), str(folder)],
        capture_output=True,
        text=True,
        env=environment | {"HF_DATASETS_CACHE": str(folder / "cache")},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return folder, done


@pytest.fixture(scope="module")
def alone(launched):
    """The same in one process, with batches of two."""
    folder, _ = launched
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    words = ["--model_name_or_path", folder / "scaled", "--dataset_name", folder / "text.jsonl", *SMALL]
    heal = [*words, "--drop_layers", 1, "--teacher", folder / "scaled"]
    apart = [*words, "--packing_strategy", "bfd", "--dataset_streaming", "--per_device_eval_batch_size", 4]
    assert recipe.run("continue_pretrain", *apart, "--output_dir", folder / "alone-apart") == 0
    pretrain = [*words[2:], "--num_hidden_layers", 2, "--vocab_size", 300]
    assert recipe.run("continue_pretrain", *words, "--output_dir", folder / "alone") == 0
    assert recipe.run("heal", *heal, "--output_dir", folder / "alone-heal") == 0
    own = [*words, "--drop_layers", 1, "--self_data", 40]
    assert recipe.run("heal", *own, "--output_dir", folder / "alone-self") == 0
    control = [*words, "--drop_layers", 1, "--control"]
    assert recipe.run("heal", *control, "--output_dir", folder / "alone-control") == 0
    assert recipe.run("pretrain", *pretrain, "--output_dir", folder / "alone-pretrain") == 0
    datasets.config.HF_DATASETS_CACHE = before


@pytest.mark.parametrize("way", ["ddp", "ddp-heal", "ddp-self", "ddp-pretrain", "fsdp2", "fsdp2-heal", "fsdp2-self",
                                 "fsdp2-control"])  # fmt: skip
def test_two_processes_do_what_one_does(way, launched, alone):
    folder, _ = launched
    name = "-".join(["alone", *way.split("-")[1:]])
    one, two = recipe.metrics(folder / name), recipe.metrics(folder / way)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert recipe.losses(folder / way) == pytest.approx(recipe.losses(folder / name), rel=1e-4)
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-4)
    assert two["tokens_seen"] == one["tokens_seen"]
    for gap in (key for key in one if key.startswith("gap")):
        assert two[gap] == pytest.approx(one[gap], abs=1e-4)
    recipe.same_weights(folder / name, folder / way, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_processes_write_what_one_does(way, launched, alone):
    folder, _ = launched
    one, two = ({path.name: path.read_text() for path in (folder / name / "self_data").iterdir()}
                for name in ("alone-self", f"{way}-self"))  # fmt: skip
    assert len(one) == 3
    assert two == one


def test_no_row_is_evaluated_twice(launched, alone):
    """Neither of a stream, nor of batches without padding, of which one is one row; before any step was taken."""
    folder, _ = launched
    one, two = (recipe.history(folder / name, "eval_tokens") for name in ("alone-apart", "ddp-apart"))
    assert one == two
    one, two = (recipe.metrics(folder / name)["eval_loss_before"] for name in ("alone-apart", "ddp-apart"))
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("way", ["ddp", "fsdp2", "fsdp2-heal"])
def test_the_checkpoint_opens_like_any_other(way, launched):
    folder, _ = launched
    model = AutoModelForCausalLM.from_pretrained(folder / way)
    scales = [1, 3**-0.5, 0.5] if "heal" in way else [1, 2**-0.5, 3**-0.5, 0.5]
    assert ln_scales(model) == pytest.approx(scales)
    with torch.no_grad():
        assert model(torch.arange(20)[None]).logits.isfinite().all()


def test_fsdp2_goes_on_from_a_sharded_checkpoint(launched):
    folder, _ = launched
    assert not list((folder / "fsdp2" / "checkpoint-3").glob("*.safetensors"))
    assert recipe.metrics(folder / "fsdp2-resumed")["resumed_from"].endswith("checkpoint-3")
    recipe.same_weights(folder / "fsdp2", folder / "fsdp2-resumed", rtol=0, atol=1e-7)


@pytest.mark.parametrize("flags", [{}, {"ln_scaling": {"exponent": 0.3}}, {"ln_scaling": True, "drop_layers": [1]}])
def test_a_sharded_checkpoint_of_another_scale_or_other_layers_is_refused(flags, launched, tmp_path):
    folder, _ = launched
    config = AutoConfig.from_pretrained(folder / "scaled", ln_scaling=False)
    trainer = Trainer(AutoModelForCausalLM.from_config(config, **flags), TrainingArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match=r"fsdp2/checkpoint-3' was trained with"):
        trainer.train(resume_from_checkpoint=str(folder / "fsdp2" / "checkpoint-3"))


@pytest.mark.parametrize("flags", [{}, {"ln_scaling": {"exponent": 0.3}}])
def test_a_sharded_checkpoint_is_refused_by_itself(flags, launched):
    """Without a configuration beside it, by whoever reads it with torch.distributed.checkpoint."""
    folder, _ = launched
    stored = folder / "fsdp2" / "checkpoint-3" / "pytorch_model_fsdp_0"
    config = AutoConfig.from_pretrained(folder / "scaled", ln_scaling=False)
    model = AutoModelForCausalLM.from_config(config, **flags)
    with pytest.raises(checkpoint.CheckpointException, match="the checkpoint was saved by a model with"):
        checkpoint.load({"model": model.state_dict()}, checkpoint_id=stored)
    right = AutoModelForCausalLM.from_config(config, ln_scaling=True)
    checkpoint.load({"model": right.state_dict()}, checkpoint_id=stored)


def test_a_signal_to_one_process_stops_both_at_the_same_step(launched):
    folder, done = launched
    assert {path.name for path in (folder / "stopped").glob("checkpoint-*")} == {"checkpoint-2"}
    said = [line for line in done.stderr.splitlines() if "stopped by SIGTERM after step 2" in line]
    assert len(said) == 1
    assert "start it as before, with --resume_from_checkpoint true" in said[0]
