"""Drafts for speculative decoding: the model without some of its layers, on the same weights."""

import copy
import types

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaModel

import tiny
from hf_lnscale import ln_scales
from hf_lnscale.pruning.plan import PruningPlan, fingerprint
from hf_lnscale.pruning.speculative import draft_model
from oracles import decoder_layers

# Their state cannot be taken back to before a rejected token.
STATEFUL = ["qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"]
GREEDY = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}


class Skip(nn.Module):
    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states


def skipping(model, layers):
    """The oracle: a deep copy in which the layers hand their input on. Configuration and numbering are untouched."""
    twin = copy.deepcopy(model)
    for layer in layers:
        decoder_layers(twin)[layer] = Skip()
    return twin


def with_idle_layers(layers, **changes):
    """A model in which some layers add nothing to the residual stream."""
    model = tiny.model(**changes)
    with torch.no_grad():
        for layer in layers:
            decoder_layers(model)[layer].self_attn.o_proj.weight.zero_()
            decoder_layers(model)[layer].mlp.down_proj.weight.zero_()
    return model


@torch.no_grad()
def written_by(model, prompt, count):
    """Greedy decoding without a cache."""
    for _ in range(count):
        prompt = torch.cat([prompt, model(prompt, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return prompt


@torch.no_grad()
def logits(model, tokens=None):
    return model(tiny.tokens() if tokens is None else tokens, use_cache=False).logits


# --- the draft ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_draft_is_the_model_without_the_layers(family):
    model = tiny.model(family, ln_scaling=True)
    draft = draft_model(model, [1])
    oracle = skipping(model, [1])
    assert torch.equal(logits(draft), logits(oracle))
    assert len(decoder_layers(draft)) == 3
    assert ln_scales(draft) == [ln_scales(model)[layer] for layer in (0, 2, 3)]
    # On its own, with its own cache.
    assert torch.equal(draft.generate(tiny.tokens(2, 5), **GREEDY)[:, :12], written_by(oracle, tiny.tokens(2, 5), 7))


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in tiny.FAMILIES if family not in STATEFUL])
def test_the_text_is_the_models_own(family):
    model = tiny.model(family, ln_scaling=True)
    prompt = tiny.tokens(1, 5)
    expected = model.generate(prompt, **GREEDY)
    assert torch.equal(model.generate(prompt, assistant_model=draft_model(model, [1, -1]), **GREEDY), expected)
    assert torch.equal(model.generate(prompt, **GREEDY), expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text", "ministral"])
def test_the_text_is_the_models_own_beyond_a_sliding_window(family):
    model = tiny.model(family, sliding_window=6)
    prompt = tiny.tokens(1, 5)
    for dropped in ([0], [1], [1, 2]):
        draft = draft_model(model, dropped, num_assistant_tokens=3)
        assert torch.equal(model.generate(prompt, assistant_model=draft, **GREEDY), model.generate(prompt, **GREEDY)), (
            dropped
        )


@pytest.mark.parametrize("family", STATEFUL)
def test_linear_attention_has_no_assisted_generation(family):
    model = tiny.model(family)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(tiny.tokens(1, 5), assistant_model=draft_model(model, [1]), **GREEDY)


class Allocated(TorchDispatchMode):
    """Counts the numbers that tensor operations put into memory."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numbers += out.numel() if isinstance(out, torch.Tensor) and not out.is_meta else 0
        return out


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "deepseek_v3", "qwen3_vl_text"])
def test_no_weight_is_held_twice(family):
    model = tiny.model(family, tie_word_embeddings=True)
    model.something = {"a tensor": torch.zeros(9)}  # as quantized layers hold some
    with Allocated() as allocated:
        draft = draft_model(model, [2])
    assert allocated.numbers == 0
    assert draft.something["a tensor"] is model.something["a tensor"]
    held = {id(parameter) for parameter in model.parameters()}
    assert all(id(parameter) in held for parameter in draft.parameters())
    own = {buffer.data_ptr() for buffer in model.buffers()}
    assert all(buffer.data_ptr() in own for buffer in draft.buffers())
    assert draft.get_output_embeddings().weight is model.get_input_embeddings().weight
    # But no module is the model's.
    assert not {id(module) for module in draft.modules()} & {id(module) for module in model.modules()}


def test_the_model_stays_as_it_is():
    model = tiny.model("gemma3_text", ln_scaling=True).train()
    before, config, weights = logits(model), model.config.to_dict(), copy.deepcopy(model.state_dict())
    draft = draft_model(model, [0, 2])
    draft.generate(tiny.tokens(1, 5), **GREEDY)
    assert not draft.training
    assert model.training
    assert torch.equal(logits(model), before)
    assert model.config.to_dict() == config
    assert model.generation_config.num_assistant_tokens is None
    assert [layer.self_attn.layer_idx for layer in decoder_layers(model)] == [0, 1, 2, 3]
    assert [layer.self_attn.layer_idx for layer in decoder_layers(draft)] == [0, 1]
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    # Attention reads the configuration at run time: the draft's reads the draft's.
    assert decoder_layers(draft)[0].self_attn.config is draft.config
    assert draft.config.num_hidden_layers == len(draft.config.layer_types) == 2


def test_a_draft_follows_training():
    model = tiny.model(ln_scaling=True)
    draft = draft_model(model, [1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    before = logits(draft)
    model(tiny.tokens(), labels=tiny.tokens()).loss.backward()
    optimizer.step()
    assert not torch.equal(logits(draft), before)
    assert torch.equal(logits(draft), logits(skipping(model, [1])))


def test_a_draft_follows_a_change_of_dtype():
    """Its buffers stay what they were; the text is the model's own all the same."""
    model = tiny.model()
    draft = draft_model(model, [1])
    model.to(torch.bfloat16)
    assert draft.dtype == torch.bfloat16
    model.float()
    assert torch.equal(
        model.generate(tiny.tokens(1, 5), assistant_model=draft, **GREEDY), model.generate(tiny.tokens(1, 5), **GREEDY)
    )
    low = tiny.model().to(torch.bfloat16)
    assert torch.equal(logits(draft_model(low, [1])), logits(skipping(low, [1])))


def test_hidden_states_are_the_drafts():
    """transformers captures them with hooks that it installs at the first use."""
    model = tiny.model()
    model(tiny.tokens(), output_hidden_states=True)
    draft = draft_model(model, [1])
    out = draft(tiny.tokens(), output_hidden_states=True)
    expected = skipping(model, [1])(tiny.tokens(), output_hidden_states=True).hidden_states
    assert len(out.hidden_states) == 4
    assert torch.equal(out.hidden_states[1], expected[1])
    assert len(model(tiny.tokens(), output_hidden_states=True).hidden_states) == 5


@pytest.mark.slow
def test_lora():
    model = tiny.model(ln_scaling=True)
    lora = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()
    draft = draft_model(lora, [1])
    assert torch.equal(logits(draft), logits(skipping(lora, [1])))
    assert {id(parameter) for parameter in draft.parameters()} < {id(parameter) for parameter in lora.parameters()}
    expected = lora.generate(tiny.tokens(1, 5), **GREEDY)
    assert torch.equal(lora.generate(tiny.tokens(1, 5), assistant_model=draft, **GREEDY), expected)


def test_what_cannot_be_shared_is_refused():
    prompted = get_peft_model(tiny.model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="PROMPT_TUNING changes the input"):
        draft_model(prompted, [1])
    model = tiny.model()
    mlp = decoder_layers(model)[1].mlp
    mlp.forward = lambda hidden_states: mlp.down_proj(mlp.up_proj(hidden_states))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp was replaced by a closure.*MethodType"):
        draft_model(model, [2])


@pytest.mark.parametrize(
    ("layers", "number", "message"),
    [
        ([4], 5, "layer 4 does not exist"),
        ([1, 1], 5, "given twice"),
        ([1], 0, "num_assistant_tokens must be an integer >= 1, got 0"),
        ([1], True, "num_assistant_tokens must be an integer >= 1, got True"),
    ],
)
def test_wrong_arguments(layers, number, message):
    with pytest.raises(ValueError, match=message):
        draft_model(tiny.model(), layers, num_assistant_tokens=number)


def test_a_plan_names_the_layers():
    model = tiny.model()
    plan = PruningPlan((1, 3), fingerprint(model.config))
    draft = draft_model(model, plan)
    assert torch.equal(logits(draft), logits(skipping(model, [1, 3])))
    assert draft.generation_config.num_assistant_tokens == 5
    with pytest.raises(ValueError, match="the plan was made for another model"):
        draft_model(tiny.model(num_hidden_layers=5), plan)


def test_methods_bound_to_modules_are_bound_to_the_drafts():
    """As kernels and accelerate do it. One that stays with the model's attention would write into a wrong cache."""
    model = tiny.model(ln_scaling=True)
    for module in model.modules():
        if type(module).__name__ in ("LlamaAttention", "LlamaRMSNorm"):
            module.forward = types.MethodType(type(module).forward, module)
    draft = draft_model(model, [0])
    attention = decoder_layers(draft)[0].self_attn
    assert attention.forward.__self__ is attention
    assert attention.layer_idx == 0
    assert torch.equal(logits(draft), logits(skipping(model, [0])))


@pytest.mark.slow
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_model_that_accelerate_dispatched(place, tmp_path):
    tiny.model(ln_scaling=True).save_pretrained(tmp_path / "model")
    places = {f"model.layers.{i}": place if i in (1, 2) else "cpu" for i in range(4)}
    places |= {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    ).eval()
    draft = draft_model(model, [1])
    assert torch.equal(logits(draft), logits(skipping(tiny.model(ln_scaling=True), [1])))
    expected = tiny.model(ln_scaling=True).generate(tiny.tokens(1, 5), **GREEDY)
    assert torch.equal(model.generate(tiny.tokens(1, 5), assistant_model=draft, **GREEDY), expected)
    assert torch.equal(model.generate(tiny.tokens(1, 5), **GREEDY), expected)


def test_a_model_without_a_head():
    model = LlamaModel(tiny.config()).eval()
    draft = draft_model(model, [1])
    with torch.no_grad():
        assert draft(tiny.tokens()).last_hidden_state.shape == (2, 12, tiny.HIDDEN)


@pytest.mark.slow
def test_sampling():
    model = with_idle_layers([1])
    settings = {"max_new_tokens": 20, "do_sample": True, "eos_token_id": None}
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(model.generate(tiny.tokens(1, 5), assistant_model=draft_model(model, [1, 2]), **settings))
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


@pytest.mark.slow
def test_sampling_keeps_the_models_distribution():
    """The first two tokens over a vocabulary of four, after a draft that is often wrong."""
    model = tiny.model(vocab_size=4, pad_token_id=0, bos_token_id=1, eos_token_id=None)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    draft, prompt = draft_model(model, [0, 1], num_assistant_tokens=2), torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        p_V = model(prompt).logits[0, -1].softmax(-1)
        after_VV = torch.stack([model(torch.cat([prompt, torch.tensor([[v]])], 1)).logits[0, -1] for v in range(4)])
        q_V = draft(prompt).logits[0, -1].softmax(-1)
    expected = (p_V[:, None] * after_VV.softmax(-1)).flatten()
    assert (p_V - q_V).abs().sum() > 0.2
    counts, draws = torch.zeros(16), 250
    for _ in range(draws):
        text = model.generate(prompt, assistant_model=draft, max_new_tokens=4, do_sample=True, top_k=0, pad_token_id=0)
        counts[text[0, 3] * 4 + text[0, 4]] += 1
    deviation = (counts - draws * expected) / (draws * expected * (1 - expected)).sqrt()
    assert deviation.abs().max() < 4


def test_more_than_one_sequence_is_refused_by_transformers():
    model = tiny.model()
    with pytest.raises(ValueError, match="batch_size = 1"):
        model.generate(tiny.tokens(2, 5), assistant_model=draft_model(model, [1]), **GREEDY)
