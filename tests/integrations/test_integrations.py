"""What other programs do with hf_lnscale, as far as it can be tested without them; `make axolotl-test` runs axolotl."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

import hf_lnscale
import tiny
from hf_lnscale.core.record import record


def test_axolotl_sets_the_flags_on_a_configuration(tmp_path):
    """One after the other, from `overrides_of_model_config`; then it builds a model from that, or loads one."""
    tiny.model().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    # In the order of the plugin's FLAGS.
    flags = {"drop_attention": [2], "drop_mlp": [3], "drop_layers": [1], "ln_scaling": {"warmup_steps": 10, "step": 10}}
    for key, value in flags.items():
        setattr(config, key, value)
    assert str(record(config).dropped) == "layers 1; attention of layers 2; MLPs of layers 3"
    with pytest.warns(UserWarning, match="enabled"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, config=config)
    for model in (loaded, AutoModelForCausalLM.from_config(config)):
        assert hf_lnscale.ln_scales(model) == pytest.approx([1, 3**-0.5, 4**-0.5])


def test_hf_finds_the_command(tmp_path):
    """`hf` runs the script hf-NAME of an extension as `hf NAME`; a note by its installer says where the script is."""
    bin = Path(sys.executable).parent
    extension = tmp_path / ".local/share/hf/extensions/hf-lnscale"
    extension.mkdir(parents=True)
    note = {"owner": "me", "repo": "hf-lnscale", "repo_id": "me/hf-lnscale", "short_name": "lnscale", "type": "python"}
    note |= {"executable_path": str(bin / "hf-lnscale"), "installed_at": "2026-01-01T00:00:00+00:00"}
    (extension / "manifest.json").write_text(json.dumps(note))
    environment = os.environ | {"HOME": str(tmp_path), "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    done = subprocess.run(
        [bin / "hf", "lnscale", "--version"], check=True, capture_output=True, text=True, env=environment
    )
    assert done.stdout == hf_lnscale.__version__ + "\n"
