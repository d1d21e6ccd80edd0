"""transformers' own common tests of models and configurations, for each family of the table.

Run by upstream.py: `tests` is the folder of tests of the installed transformers, LN_CONFIGS a folder of configurations
that upstream.py wrote, and LN_SCALING says what is tested: "without" the plugin, "imported", "scaled", or in the middle
of a "warmup".
"""

import json
import os
import re
import sys
import unittest
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers as tf
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin

import tiny

CONFIGS = Path(os.environ["LN_CONFIGS"])
MODE = os.environ["LN_SCALING"]
CHANGES = {}
if MODE != "without":
    import hf_lnscale

    scalings = {"imported": None, "scaled": {"exponent": 0.5}, "warmup": {"warmup_steps": 10, "step": 5}}
    if (scaling := hf_lnscale.LNScalingConfig.of(scalings[MODE])) is not None:
        CHANGES = {"ln_scaling": scaling.to_dict()}

# Two thirds of the time go into 25 variants of one test, of padding, masks and kernels of attention, and into one that
# loads in every dtype by `dtype` and by its older name `torch_dtype`. But for Llama, four of the variants are run: one
# of each dtype, and the one with attention weights.
MANY = [name for name in dir(ModelTesterMixin) if re.match(r"test_eager_matches_sdpa_inference_(?!00|09|17|24)", name)]
MANY += ["test_bc_torch_dtype"]
# The models get text alone.
OTHER_INPUTS = [name for name in dir(ModelTesterMixin) if re.match(r"test_get_(image|video|audio)_features", name)]
DIVISIBLE = 12480  # by the default number of heads of every family


class Tester:
    is_training, batch_size, seq_length = True, 3, 7
    num_hidden_layers, num_attention_heads, hidden_size = tiny.LAYERS, 4, tiny.HIDDEN

    def __init__(self, family, config_class):
        self.family, self.config_class = family, config_class

    def get_config(self):
        read = self.config_class.from_json_file(CONFIGS / f"{self.family}.json")
        return self.config_class.from_dict(read.to_dict() | CHANGES)

    def prepare_config_and_inputs_for_common(self):
        ids = tiny.tokens(self.batch_size, self.seq_length)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class FamilyTest(GenerationTesterMixin, ModelTesterMixin):
    test_num_layers_is_small = None  # of transformers' own testers: the tiny models here have four layers

    def setUp(self):
        self.model_tester = Tester(self.family, self.config_class)
        size = self.config_class.attribute_map.get("hidden_size", "hidden_size")
        given = {size: DIVISIBLE, **self.required, **CHANGES}
        if self._is_composite:  # the flag belongs to the part that is the text decoder
            given = {"text_config": json.loads(self.model_tester.get_config().to_json_string())["text_config"]}
        self.config_tester = ConfigTester(
            self, config_class=self.config_class, has_text_modality=not self._is_composite, **given
        )

    def test_config(self):
        self.config_tester.run_common_tests()


for family, (config_class, required, *classes) in json.loads((CONFIGS / "classes.json").read_text()).items():
    body = {
        "family": family,
        "required": required,
        "config_class": getattr(tf, config_class),
        "all_model_classes": tuple(getattr(tf, name) for name in classes),
        "_is_composite": "text_config" in getattr(tf, config_class).sub_configs,
    }
    body |= dict.fromkeys(OTHER_INPUTS if family == "llama" else OTHER_INPUTS + MANY)
    globals()[f"Test_{family}"] = type(f"Test_{family}", (FamilyTest, unittest.TestCase), body)


class Test_composite_configs(unittest.TestCase):
    """Configurations, in their full size, of models with a text decoder of the table inside."""


def config_test(config_class):
    def test(self):
        text = json.loads(config_class().to_json_string())["text_config"] | CHANGES
        self.model_tester = SimpleNamespace(get_config=lambda: config_class(text_config=text))
        ConfigTester(self, config_class, has_text_modality=False, text_config=text).run_common_tests()

    return test


for kind in json.loads((CONFIGS / "composite.json").read_text()):
    setattr(Test_composite_configs, f"test_{kind}", config_test(tf.CONFIG_MAPPING[kind]))

assert ("hf_lnscale" in sys.modules) == (MODE != "without")
