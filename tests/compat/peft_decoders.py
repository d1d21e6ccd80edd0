"""PEFT's own tests of decoders, over tiny models of ours under the names that these tests ask the Hub for.

Run by upstream.py as transformers_common.py is. The models lie in a cache laid out like the Hub's. Those of families in
the table are scaled, or in the middle of a warmup, as LN_SCALING says; the others are plain in every mode.
"""

import os
import sys
import tempfile
from pathlib import Path

CACHE = tempfile.TemporaryDirectory()
os.environ["HF_HUB_CACHE"] = CACHE.name  # read when huggingface_hub is imported

import torch  # noqa: E402
import transformers as tf  # noqa: E402
from tests.test_decoder_models import *  # noqa: E402, F403
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

from tests import testing_utils  # noqa: E402

SCALING = {"scaled": True, "warmup": {"warmup_steps": 10, "step": 5}}.get(os.environ["LN_SCALING"])
if os.environ["LN_SCALING"] != "without":
    import hf_lnscale
    from hf_lnscale.core.families import FAMILIES

SIZES = {"vocab_size": 1024, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
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
}

words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(SIZES["vocab_size"])}, unk_token="w3"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2")
for name, config_class in MODELS.items():
    folder = Path(CACHE.name, f"models--{name.replace('/', '--')}")
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config_class(**SIZES))
    if SCALING and not FAMILIES[model.config.model_type].no_scaling:
        hf_lnscale.apply_ln_scaling(model, SCALING)
    model.save_pretrained(folder / "snapshots" / ("0" * 40))
    tokenizer.save_pretrained(folder / "snapshots" / ("0" * 40))
    # Seen before, so that the tests do not ask the Hub.
    testing_utils._HUB_MODEL_ACCESSES |= {name: 1, name + name: 1}

assert ("hf_lnscale" in sys.modules) == (os.environ["LN_SCALING"] != "without")
