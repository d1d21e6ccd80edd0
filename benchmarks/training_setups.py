"""What LayerNorm Scaling costs in common training setups: DDP and FSDP2 on every GPU, QLoRA on one.

    python benchmarks/training_setups.py --size 130M --batch 16 --length 512   # on two CPU processes without a GPU
    python benchmarks/training_setups.py --setup QLoRA --size 1B

Prints one table. Training steps with and without the scale alternate. The table shows the median and quartiles of the
ratio over all pairs, and the peak memory of one process, which holds both models. "loss" is the largest difference
between the first loss of the scaled model and a reference: for DDP and FSDP2, one process on the whole batch; for
QLoRA, the folded checkpoint, whose norms need no scale.
"""

from __future__ import annotations

import os
import tempfile
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import typer
from ln_scaling_overhead import build, train_step
from rich.console import Console
from rich.table import Table
from timing import DEVICE, SIZES, machine, one_of, quartiles, ratios
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import hf_lnscale
from hf_lnscale.evaluation import speed

WORLD = max(1, torch.cuda.device_count()) if DEVICE == "cuda" else 2


def tokens(size: str, shape: tuple[int, int]) -> torch.Tensor:
    return torch.randint(0, SIZES[size][4], shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)


@torch.no_grad()
def loss_of(model: nn.Module, tokens_BT: torch.Tensor) -> torch.Tensor:
    return model(tokens_BT, labels=tokens_BT).loss.float()


def fsdp2(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


PARALLEL = {"DDP": DistributedDataParallel, "FSDP2": fsdp2}


def worker(rank: int, folder: str, setup: str, size: str, shape: tuple[int, int], count: int) -> None:
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // WORLD))
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    whole_BT = tokens(size, shape)
    reference = loss_of(build(size, "LNS"), whole_BT)
    own_BT = whole_BT.chunk(WORLD)[rank]
    plain, scaled = (PARALLEL[setup](build(size, scaling)) for scaling in ("plain", "LNS"))
    loss = loss_of(scaled, own_BT)
    dist.all_reduce(loss)
    times, _ = ratios(train_step(scaled, own_BT), train_step(plain, own_BT), count, setup, warmup=3)
    if rank == 0:
        torch.save((times, abs(loss / WORLD - reference).item(), speed.peak_memory(DEVICE)), f"{folder}/found")
    dist.destroy_process_group()


def parallel(setup: str, size: str, shape: tuple[int, int], count: int) -> tuple[list[float], float, int]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (folder, setup, size, shape, count), nprocs=WORLD)
        return torch.load(f"{folder}/found")


def four_bit(model: Any) -> nn.Module:
    """The model loaded in 4 bits from its checkpoint, with LoRA on every linear layer."""
    from peft import LoraConfig, get_peft_model

    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=model.dtype)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        base = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=quantization, dtype=model.dtype, device_map=DEVICE
        )
    return get_peft_model(base, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")).train()


def qlora(size: str, shape: tuple[int, int], count: int) -> tuple[list[float], float, int]:
    tokens_BT = tokens(size, shape)
    plain, scaled = (four_bit(build(size, scaling)) for scaling in ("plain", "LNS"))
    folded = four_bit(hf_lnscale.fold_ln_scaling(build(size, "LNS")))
    difference = abs(loss_of(scaled, tokens_BT) - loss_of(folded, tokens_BT)).item()
    times, _ = ratios(train_step(scaled, tokens_BT), train_step(plain, tokens_BT), count, "QLoRA", warmup=3)
    return times, difference, speed.peak_memory(DEVICE)


SETUPS = [*PARALLEL, "QLoRA"]


def main(
    setup: Annotated[list[str], one_of(SETUPS, "One of {}; repeatable.")] = SETUPS,
    size: Annotated[str, one_of(SIZES)] = "10M",
    count: Annotated[int, typer.Option(help="Number of pairs to time.")] = 20,
    batch: Annotated[int, typer.Option(help=f"Sequences per batch, over all {WORLD} processes.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 256,
) -> None:
    if batch % WORLD:
        raise typer.BadParameter(f"{batch} is not a multiple of the {WORLD} processes", param_hint="--batch")
    table = Table("setup", "processes", "LNS / plain, a training step", "quartiles", "loss", "peak memory")
    table.title = (
        f"LayerNorm Scaling in training, Llama {size}, {batch} x {length} tokens, {count} pairs\n"
        f"{machine(threads=False)}"
    )
    for one in setup:
        shared = one in PARALLEL
        given = (size, (batch, length), count)
        times, difference, peak = parallel(one, *given) if shared else qlora(*given)
        cells = *quartiles(times, "inclusive"), f"{difference:.1e}", f"{peak / 2**20:,.0f} MiB"
        table.add_row(one, str(WORLD) if shared else "1", *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
