"""Weights and configuration belong together: after kills, when files are mixed, when a model is loaded by its name."""

import copy
import inspect
import json
import os
import random
import shutil
import signal
import threading
import time

import accelerate
import pytest
import torch
from accelerate.utils import merge_fsdp_weights
from safetensors import safe_open
from torch.distributed import checkpoint as distributed
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import hf_lnscale
import processes
import tiny

KILLS = int(os.environ.get("KILLS", "8"))
SHARDS = {"one file": "5GB", "sharded": "20KB"}


def scaled():
    return tiny.model(ln_scaling=True)


def cut(model):
    return hf_lnscale.drop_layers(model, [1])


# What is on disk, and what is saved over it.
CHANGES = {
    "fold": (scaled, hf_lnscale.fold_ln_scaling),
    "unfold": (lambda: hf_lnscale.fold_ln_scaling(scaled()), hf_lnscale.unfold_ln_scaling),
    "drop": (tiny.model, cut),
    "drop from a scaled one": (scaled, cut),
    "scale": (tiny.model, lambda model: hf_lnscale.apply_ln_scaling(model)),
    "remove": (scaled, hf_lnscale.remove_ln_scaling),
}


def logits(model):
    with torch.no_grad():
        return model(tiny.tokens()).logits


@pytest.mark.slow
@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_killed_save_leaves_the_old_model_the_new_one_or_an_error(change, shards, tmp_path):
    make, then = CHANGES[change]
    make().save_pretrained(tmp_path / "old", max_shard_size=SHARDS[shards])
    old = AutoModelForCausalLM.from_pretrained(tmp_path / "old")
    new = then(copy.deepcopy(old))
    with torch.no_grad():  # so that a mixture of old and new tensors shows
        for parameter in new.parameters():
            parameter.add_(0.01)
    known = [logits(old), logits(new)]
    # That of transformers' bars is shared by forks, and stays locked if one of them is killed.
    tqdm.set_lock(threading.RLock())
    for _ in range(2):  # the first imports what saving needs, and would put most kills behind the end
        started = time.perf_counter()
        new.save_pretrained(tmp_path / "timed", max_shard_size=SHARDS[shards])
        duration = time.perf_counter() - started
    found = []
    for kill in range(KILLS):
        folder = tmp_path / f"{kill}"
        shutil.copytree(tmp_path / "old", folder)
        child = os.fork()
        if not child:
            new.save_pretrained(folder, max_shard_size=SHARDS[shards])
            os._exit(0)
        time.sleep(random.uniform(0, 1.3 * duration))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        try:
            left = logits(AutoModelForCausalLM.from_pretrained(folder))
        except (OSError, ValueError, RuntimeError):
            found.append("error")
            continue
        same = [left.shape == one.shape and torch.equal(left, one) for one in known]
        assert any(same), "neither the old model nor the new one"
        found.append("old" if same[0] else "new")
        shutil.rmtree(folder)
    assert len(found) == KILLS


@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("change", ["fold", "unfold", "drop from a scaled one"])
@pytest.mark.parametrize("which", ["config", "weights"])
def test_files_of_two_models_are_refused_by_name(change, which, shards, tmp_path):
    make, then = CHANGES[change]
    model = make()
    for name in ("old", "new"):
        model.save_pretrained(tmp_path / name, max_shard_size=SHARDS[shards])
        model = then(model) if name == "old" else model
    for file in (tmp_path / "old").iterdir():
        is_weights = file.name.startswith("model.safetensors") or file.suffix == ".safetensors"
        if is_weights == (which == "weights"):
            shutil.copy(file, tmp_path / "new")
    for load in (AutoModelForCausalLM, LlamaForCausalLM):
        with pytest.raises((ValueError, OSError), match=r"was saved by a model with|No such file"):
            load.from_pretrained(tmp_path / "new")


def by_torch(model, folder, **_):
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def by_accelerate(model, folder, safe):
    accelerate.Accelerator(cpu=True).save_model(model, folder, safe_serialization=safe)


def by_accelerate_in_shards(model, folder, safe):
    accelerate.Accelerator(cpu=True).save_model(model, folder, "20KB", safe)


def merged(model, folder, safe):
    distributed.save({"model": model.state_dict()}, checkpoint_id=folder / "sharded")
    merge_fsdp_weights(folder / "sharded", folder, safe_serialization=safe)


# Who writes weights without a configuration, and whether as safetensors.
WRITERS = {
    "torch.save": (by_torch, False),
    "accelerate": (by_accelerate, True),
    "accelerate, pickled": (by_accelerate, False),
    "accelerate, in shards": (by_accelerate_in_shards, True),
    "accelerate, pickled in shards": (by_accelerate_in_shards, False),
    "merge_fsdp_weights": (merged, True),
    "merge_fsdp_weights, pickled": (merged, False),
}
# Models of as many layers and the same names.
ALIKE = {
    "plain": lambda: tiny.model(num_hidden_layers=3),
    "scaled": lambda: tiny.model(num_hidden_layers=3, ln_scaling=True),
    "folded": lambda: hf_lnscale.fold_ln_scaling(tiny.model(num_hidden_layers=3, ln_scaling=True)),
    "cut": lambda: cut(tiny.model()),
    "cut elsewhere": lambda: hf_lnscale.drop_layers(tiny.model(), [2]),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALIKE)
@pytest.mark.parametrize("writer", WRITERS)
def test_weights_are_refused_beside_the_configuration_of_another_model(writer, kind, tmp_path):
    write, safe = WRITERS[writer]
    model = ALIKE[kind]()
    write(model, tmp_path, safe=safe)
    del model  # merge_fsdp_weights has no model
    for other, make in ALIKE.items():
        wanted = make()
        wanted.config.save_pretrained(tmp_path)
        if other == kind:
            assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(wanted))
        elif kind != "plain":  # which leaves no mark
            with pytest.raises(ValueError, match="the weights of one model and the configuration of another"):
                AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.slow
def test_the_weights_of_a_plain_model_are_written_as_without_the_plugin(tmp_path, run_python):
    code = """
    import sys, pathlib, torch, accelerate
    sys.path.insert(0, sys.argv[2])
    import tiny
    from accelerate.utils import merge_fsdp_weights
    from torch.distributed import checkpoint
    folder, model = pathlib.Path(sys.argv[1]), tiny.model()
    checkpoint.save({"model": model.state_dict()}, checkpoint_id=folder / "sharded")
    for safe in (True, False):
        accelerate.Accelerator(cpu=True).save_model(model, folder / "a", safe_serialization=safe)
        merge_fsdp_weights(folder / "sharded", folder / "b", safe_serialization=safe)
    """
    for plugin in (True, False):
        (tmp_path / str(plugin)).mkdir()
        run_python(code, tmp_path / str(plugin), tiny.__file__.rpartition("/")[0], plugin=plugin)
    for name in ("a/model.safetensors", "a/pytorch_model.bin", "b/model.safetensors", "b/pytorch_model.bin"):
        assert (tmp_path / "True" / name).read_bytes() == (tmp_path / "False" / name).read_bytes()


def test_checkpoints_without_the_mark_load(tmp_path):
    from safetensors.torch import load_file, save_file

    model = scaled()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    with safe_open(file, "pt") as weights:
        assert json.loads(weights.metadata()["hf_lnscale"])["ln_scaling"]["depths"] == [1, 2, 3, 4]
    save_file(load_file(file), file, metadata={"format": "pt"})
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


@pytest.mark.slow
def test_a_plain_model_is_saved_as_without_the_plugin(tmp_path, run_python):
    tiny.model().save_pretrained(tmp_path / "with")
    code = """
    import sys, tiny
    tiny.model().save_pretrained(sys.argv[1])
    """
    run_python(code, tmp_path / "without", plugin=False)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()
    assert sorted(os.listdir(tmp_path / "with")) == sorted(os.listdir(tmp_path / "without"))


def test_a_save_that_fails_at_once_leaves_what_was_there(tmp_path, monkeypatch):
    model = scaled()
    model.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(type(model.config), "save_pretrained", full)
    with pytest.raises(OSError, match="no space left"):
        model.save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def save_shards(rank, port, folder):
    """Each of two processes writes its shard: the model that is there, then the same with its scale folded."""
    from transformers.distributed import DistributedConfig

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.distributed.init_process_group("gloo")
    model = AutoModelForCausalLM.from_pretrained(folder / "one file", distributed_config=DistributedConfig(fsdp_size=2))
    for name in ("old", "new"):
        model.save_pretrained(folder / name, distributed_checkpoint=True, is_main_process=rank == 0)
        if name == "old":
            hf_lnscale.fold_ln_scaling(model)
    torch.distributed.destroy_process_group()
    processes.leave()


@pytest.mark.slow
@pytest.mark.skipif(
    "distributed_checkpoint" not in inspect.signature(LlamaForCausalLM.save_pretrained).parameters,
    reason="transformers has it from 5.20 on",
)
@pytest.mark.filterwarnings("error:the checkpoint was saved by a model with")
def test_shards_of_two_processes_know_their_model(tmp_path):
    model = scaled()
    model.save_pretrained(tmp_path / "one file")
    torch.multiprocessing.spawn(save_shards, (processes.free_port(), tmp_path), nprocs=2)
    for name, scale in (("old", [1.0, 2**-0.5, 3**-0.5, 0.5]), ("new", [1.0] * 4)):
        assert len(list((tmp_path / name).glob("shard-*.safetensors"))) == 2
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert hf_lnscale.ln_scales(again) == pytest.approx(scale)
        torch.testing.assert_close(logits(again), logits(model))
    shutil.copy(tmp_path / "old/config.json", tmp_path / "new")
    with pytest.raises(ValueError, match=r"shard-.* was saved by a model with .*ln_scaling_folded"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "new")


# --- loaded again by name ---------------------------------------------------------------------------------------------


def on_load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, drop_layers=[1])


def in_memory(folder):
    return hf_lnscale.drop_layers(AutoModelForCausalLM.from_pretrained(folder), [1])


def twice(folder):
    return hf_lnscale.drop_layers(AutoModelForCausalLM.from_pretrained(folder, drop_layers=[1]), [1])


@pytest.mark.slow
@pytest.mark.parametrize("on_disk", ["plain", "scaled", "cut"])
@pytest.mark.parametrize("make", [on_load, in_memory, twice, AutoModelForCausalLM.from_pretrained])
def test_the_name_of_a_model_gives_that_model_again(make, on_disk, tmp_path):
    original = {"plain": tiny.model, "scaled": scaled, "cut": lambda: cut(scaled())}[on_disk]()
    original.save_pretrained(tmp_path)
    model = make(tmp_path)
    for load in (AutoModelForCausalLM, LlamaForCausalLM):
        again = load.from_pretrained(model.config._name_or_path)
        assert len(again.model.layers) == len(model.model.layers)
        assert torch.equal(logits(again), logits(model))
        assert hf_lnscale.ln_scales(again) == hf_lnscale.ln_scales(model)
    # Who writes the path itself means the checkpoint.
    assert len(AutoModelForCausalLM.from_pretrained(str(tmp_path)).model.layers) == len(original.model.layers)


@pytest.mark.parametrize("then", [hf_lnscale.fold_ln_scaling, hf_lnscale.remove_ln_scaling])
def test_scale_changed_in_memory(then, tmp_path):
    scaled().save_pretrained(tmp_path)
    model = then(AutoModelForCausalLM.from_pretrained(tmp_path))
    again = AutoModelForCausalLM.from_pretrained(model.config._name_or_path)
    assert torch.equal(logits(again), logits(model))


def test_a_model_healed_in_memory_is_not_loaded_as_another(tmp_path):
    tiny.speaker(max_position_embeddings=64).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = tiny.said_by(model, 40, 32)  # on its own text a map helps
    report = hf_lnscale.heal(model, [1], ids, cross_validate=False, progress=False)
    assert report.kept
    report.undo()
    assert len(AutoModelForCausalLM.from_pretrained(model.config._name_or_path).model.layers) == 4
    report = hf_lnscale.heal(model, [1], ids, cross_validate=False, progress=False)
    hf_lnscale.drop_layers(model, [1])
    with pytest.raises(ValueError, match=r"healed in memory.*copy\.deepcopy"):
        AutoModelForCausalLM.from_pretrained(model.config._name_or_path)
    model.save_pretrained(tmp_path / "healed")
    healed = AutoModelForCausalLM.from_pretrained(tmp_path / "healed")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(healed.config._name_or_path)), logits(model))
