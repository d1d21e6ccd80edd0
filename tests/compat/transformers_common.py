"""transformers' own common tests of models and configurations, for each family of the table.

Run by upstream.py: `tests` is the folder of tests of the installed transformers, and the environment variable
LN_SCALING says what is tested: "without" the plugin, "imported", "scaled", or in the middle of a "warmup".
"""

import json
import os
import sys
import unittest

import torch
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin
from transformers.models.auto import modeling_auto as auto

import tiny

MODE = os.environ["LN_SCALING"]
CHANGES = {}
if MODE != "without":
    import hf_lnscale

    scalings = {"imported": None, "scaled": {"exponent": 0.5}, "warmup": {"warmup_steps": 10, "step": 5}}
    if (scaling := hf_lnscale.LNScalingConfig.of(scalings[MODE])) is not None:
        CHANGES = {"ln_scaling": scaling.to_dict()}

HEADS = (
    auto.MODEL_MAPPING,
    auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
)


class Tester:
    is_training, batch_size, seq_length = True, 3, 7
    num_hidden_layers, num_attention_heads, hidden_size = tiny.LAYERS, 4, tiny.HIDDEN

    def __init__(self, family):
        self.family = family

    def get_config(self):
        return tiny.config(self.family, **CHANGES)

    def prepare_config_and_inputs_for_common(self):
        ids = tiny.tokens(self.batch_size, self.seq_length)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class FamilyTest(GenerationTesterMixin, ModelTesterMixin):
    test_num_layers_is_small = None  # of transformers' own testers: the tiny models here have four layers

    def setUp(self):
        self.model_tester = Tester(self.family)
        given = {"hidden_size": tiny.HIDDEN, **CHANGES}
        if self._is_composite:  # the flag belongs to the part that is the text decoder
            given = {"text_config": json.loads(self.model_tester.get_config().to_json_string())["text_config"]}
        self.config_tester = ConfigTester(
            self, config_class=self.config_class, has_text_modality=not self._is_composite, **given
        )

    def test_config(self):
        self.config_tester.run_common_tests()


for family, (config_class, *_) in tiny.FAMILIES.items():
    classes = dict.fromkeys(head[config_class] for head in HEADS if config_class in head)
    body = {
        "family": family,
        "config_class": config_class,
        "all_model_classes": tuple(classes),
        "_is_composite": family in tiny.COMPOSITE,
    }
    globals()[f"Test_{family}"] = type(f"Test_{family}", (FamilyTest, unittest.TestCase), body)

assert ("hf_lnscale" in sys.modules) == (MODE != "without")
