"""PEFT's own tests of decoders, over tiny models of ours under the names that these tests ask the Hub for.

Run by upstream.py as transformers_common.py is. The models lie in a cache laid out like the Hub's. Those that can be
are scaled, or in the middle of a warmup, as LN_SCALING says; the others are plain in every mode.
"""

import os
import sys
import tempfile
from pathlib import Path

CACHE = tempfile.TemporaryDirectory()
os.environ["HF_HUB_CACHE"] = CACHE.name  # read when huggingface_hub is imported

import datasets  # noqa: E402
import torch  # noqa: E402
import transformers as tf  # noqa: E402
from tests.test_decoder_models import *  # noqa: E402, F403
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

from tests import test_decoder_models, testing_utils  # noqa: E402

SCALING = {"scaled": True, "warmup": {"warmup_steps": 10, "step": 5}}.get(os.environ["LN_SCALING"])
if os.environ["LN_SCALING"] != "without":
    import hf_lnscale
    from hf_lnscale.core.families import FAMILIES

SIZES = {"vocab_size": 1024, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "ffn_dim": 64}
SIZES |= {"rotary_dim": 4, "word_embed_proj_dim": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": tf.OPTConfig,
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": tf.GPT2Config,
    "peft-internal-testing/tiny-random-GPTJForCausalLM": tf.GPTJConfig,
    "peft-internal-testing/tiny-dummy-qwen2": tf.Qwen2Config,
    "trl-internal-testing/tiny-random-LlamaForCausalLM": tf.LlamaConfig,
    "trl-internal-testing/tiny-Qwen3ForCausalLM": tf.Qwen3Config,
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": tf.Gemma3TextConfig,
    "hf-internal-testing/tiny-random-gpt2": tf.GPT2Config,
    "hf-internal-testing/tiny-random-MistralForCausalLM": tf.MistralConfig,
    "peft-internal-testing/tiny-random-gemma4-E2B": tf.Gemma4TextConfig,
}
# Gemma 4 E2B has heads of two sizes, layers that use the keys of earlier ones, and an input for each layer, with which
# it cannot be scaled.
E2B = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2}
E2B |= {"global_head_dim": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 1024}
# These have as many heads of keys as of queries; PEFT would believe the field.
SAME_HEADS = {"num_key_value_heads": 4, "head_dim": 8}
CHANGES = dict.fromkeys((tf.OPTConfig, tf.GPT2Config, tf.GPTJConfig), SAME_HEADS) | {tf.Gemma4TextConfig: E2B}

# Letters alone, as bytes: the tokenizer that every family's own class reads.
letters = {letter: i for i, letter in enumerate([f"w{i}" for i in range(768)] + pre_tokenizers.ByteLevel.alphabet())}
bytewise = Tokenizer(models.BPE(letters, merges=[]))
bytewise.pre_tokenizer = pre_tokenizers.ByteLevel()
tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=bytewise, pad_token="w0", bos_token="w1", eos_token="w2")
for name, config_class in MODELS.items():
    folder = Path(CACHE.name, f"models--{name.replace('/', '--')}")
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config_class(**(SIZES | CHANGES.get(config_class, {}))))
    if SCALING and not FAMILIES[model.config.model_type].no_scaling and config_class is not tf.Gemma4TextConfig:
        hf_lnscale.apply_ln_scaling(model, SCALING)
    model.save_pretrained(folder / "snapshots" / ("0" * 40))
    tokenizer.save_pretrained(folder / "snapshots" / ("0" * 40))
    # Seen before, so that the tests do not ask the Hub.
    testing_utils._HUB_MODEL_ACCESSES |= {name: 1, name + name: 1}

# One test trains five steps on quotations from the Hub.
QUOTES = datasets.Dataset.from_dict({"quote": ["To be, or not to be, that is the question."] * 40})
test_decoder_models.load_dataset_english_quotes = lambda: datasets.DatasetDict(train=QUOTES)

assert ("hf_lnscale" in sys.modules) == (os.environ["LN_SCALING"] != "without")
