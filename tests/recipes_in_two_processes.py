"""What `accelerate launch` starts in test_recipes_distributed.py: runs recipes one after the other, in DDP and FSDP2.

accelerate takes FSDP for GPUs alone; told otherwise, it runs on CPU as well.
"""

import os
import signal
import sys

import accelerate.state
import pytest
import torch
import torch.distributed as dist
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState

import processes
import recipe
from hf_lnscale.training import run_report as report


def fsdp2_on_cpu():
    """From here on, accelerate shards over the processes that there are."""
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
    os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    AcceleratorState._reset_state(reset_partial_state=True)
    original = AcceleratorState.__init__

    def __init__(self, *args, fsdp_plugin=None, **kwargs):
        first = AcceleratorState._shared_state == {}
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if first and isinstance(fsdp_plugin, FullyShardedDataParallelPlugin):
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    accelerate.state.AcceleratorState.__init__ = __init__


def main(folder):
    torch.set_num_threads(1)
    report._plot = lambda *told: []
    words = [*recipe.SMALL, "--per_device_train_batch_size", 1, "--dataset_name", f"{folder}/text.jsonl"]
    words += ["--model_name_or_path", f"{folder}/scaled"]
    heal = [*words, "--drop_layers", 1, "--teacher", f"{folder}/scaled"]
    assert recipe.run("continue_pretrain", *words, "--output_dir", f"{folder}/ddp") == 0
    assert recipe.run("heal", *heal, "--output_dir", f"{folder}/ddp-heal") == 0
    own = [*words, "--drop_layers", 1, "--self_data", 40]
    assert recipe.run("heal", *own, "--output_dir", f"{folder}/ddp-self") == 0
    apart = [*words, "--packing_strategy", "bfd", "--dataset_streaming", "--per_device_eval_batch_size", 4]
    assert recipe.run("continue_pretrain", *apart, "--output_dir", f"{folder}/ddp-apart") == 0
    pretrain = [*words[:-2], "--num_hidden_layers", 2, "--vocab_size", 300]
    assert recipe.run("pretrain", *pretrain, "--output_dir", f"{folder}/ddp-pretrain") == 0
    fsdp2_on_cpu()
    assert recipe.run("continue_pretrain", *words, "--output_dir", f"{folder}/fsdp2", "--save_steps", 3) == 0
    assert recipe.run("heal", *heal, "--output_dir", f"{folder}/fsdp2-heal") == 0
    assert recipe.run("heal", *own, "--output_dir", f"{folder}/fsdp2-self") == 0
    control = [*words, "--drop_layers", 1, "--control"]
    assert recipe.run("heal", *control, "--output_dir", f"{folder}/fsdp2-control") == 0
    resumed = ["--output_dir", f"{folder}/fsdp2-resumed", "--resume_from_checkpoint", f"{folder}/fsdp2/checkpoint-3"]
    assert recipe.run("continue_pretrain", *words, *resumed) == 0
    recipe.signal_after(2, signal.SIGTERM, pytest.MonkeyPatch(), process=1)
    assert recipe.run("continue_pretrain", *words, "--output_dir", f"{folder}/stopped") == 143
    assert not dist.is_initialized()


if __name__ == "__main__":
    main(sys.argv[1])
    processes.leave()
