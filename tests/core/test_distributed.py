"""DDP and FSDP2 on two CPU processes over gloo: the loss and the gradients of one process on the same data."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import hf_lnscale
import processes
import tiny
from oracles import decoder_layers


def step(model, tokens):
    loss = model(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    return loss.detach()


def sharded(model):
    for layer in decoder_layers(model):
        fully_shard(layer)
    return fully_shard(model)


def norms_sharded_apart(model):
    """Each norm a unit of its own, as when norms are kept in float32."""
    for layer in decoder_layers(model):
        for norm in tiny.LLAMA_NORMS:
            fully_shard(layer.get_submodule(norm), mp_policy=MixedPrecisionPolicy())
        fully_shard(layer)
    return fully_shard(model)


def checkpointed(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return sharded(model.train())


WRAP = {
    "ddp": DistributedDataParallel,
    "fsdp2": sharded,
    "fsdp2, norms apart": norms_sharded_apart,
    "fsdp2, checkpointing": checkpointed,
}


# The two processes are started once: all of these tests on one worker.
pytestmark = pytest.mark.xdist_group("distributed")

# A warmup half-way to exponent 1, moved there when the model is wrapped already, has the scales of LNS.
WARMUP = {"exponent": 1.0, "warmup_steps": 2}
SCALINGS = {"LNS": True, "warmup": WARMUP}
CASES = [(way, "llama", scaling) for way in WRAP for scaling in SCALINGS]
CASES += [("ddp", "gemma2", "LNS"), ("fsdp2", "gemma2", "LNS"), ("fsdp2", "gemma2", "warmup")]


def worker(rank, port, folder):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for way, family, scaling in CASES:
        model = WRAP[way](tiny.model(family, ln_scaling=SCALINGS[scaling]))
        if scaling == "warmup":
            hf_lnscale.set_ln_scaling_step(model, 1)
        loss = step(model, tiny.tokens(4)[rank * 2 : rank * 2 + 2])
        dist.all_reduce(loss)
        found = {}
        for name, parameter in model.named_parameters():
            gradient = parameter.grad
            found[name.removeprefix("module.")] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        found |= {"loss": loss / 2, "scales": hf_lnscale.ln_scales(model)}
        if way != "fsdp2, norms apart":
            hf_lnscale.fold_ln_scaling(model)
            with torch.no_grad():
                found["folded"] = model(tiny.tokens(4), use_cache=False).logits
        if rank == 0:
            torch.save(found, f"{folder}/{way} {family} {scaling}")
    dist.destroy_process_group()
    processes.leave()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("found")
    mp.spawn(worker, (processes.free_port(), str(folder)), nprocs=2)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("way", "family", "scaling"), CASES)
def test_two_processes_equal_one(way, family, scaling, two_processes):
    found = torch.load(two_processes / f"{way} {family} {scaling}")
    model = tiny.model(family, ln_scaling=True)
    loss = step(model, tiny.tokens(4))
    assert found["scales"] == pytest.approx([1.0, 2**-0.5, 3**-0.5, 0.5])
    torch.testing.assert_close(found["loss"], loss, rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)
    if "folded" in found:  # sharded parameters are folded where they lie
        torch.testing.assert_close(found["folded"], model(tiny.tokens(4)).logits, rtol=1e-4, atol=1e-5)
