"""Every kind of causal language model that transformers registers, against oracles that know no configuration field.

The scaled model is compared with one whose pre-norms are multiplied by hooks; the cut one with the whole model in which
hooks hand the input of the missing layers on.
"""

import copy

import kinds
import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_lnscale import fold_ln_scaling, ln_scales
from hf_lnscale.core.families import FAMILIES, KNOWN_UNSUPPORTED, NO_DROPPING
from hf_lnscale.pruning.probe import propose_from, tiny_model

TEXT = kinds.text_kinds()
# One kind for each text decoder: `gemma3` has that of `gemma3_text`.
KINDS = {text: kind for kind, text in reversed(TEXT.items()) if text not in TEXT or kind == text}
SCALED = [text for text in KINDS if text in FAMILIES and not FAMILIES[text].no_scaling]
CUT = [text for text in KINDS if text in FAMILIES and not FAMILIES[text].no_dropping]


def tokens():
    return torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))


def build(text, **changes):
    kind = KINDS[text]
    try:
        dtype = torch.float32 if text in kinds.FLOAT32 else torch.float64
        model = tiny_model(kinds.model_class(kind), kinds.config(kind, **changes), dtype)
        with torch.no_grad():
            model(tokens(), use_cache=False)
    except RuntimeError:  # computes in float32 whatever its dtype is
        model = tiny_model(kinds.model_class(kind), kinds.config(kind, **changes), torch.float32)
    return model


def logits(model, **kwargs):
    with torch.no_grad():
        return model(tokens(), use_cache=False, **kwargs).logits


def layers_of(model, text):
    path = FAMILIES[text].layers
    return next(m for n, m in model.named_modules() if n == path or n.endswith(f".{path}"))


def test_every_kind_is_in_the_table():
    """A kind of a new release fails here: its row is what `propose_family` says."""
    assert set(TEXT.values()) <= set(FAMILIES) | set(KNOWN_UNSUPPORTED)
    assert not set(FAMILIES) & set(KNOWN_UNSUPPORTED)


@pytest.mark.slow
@pytest.mark.parametrize("text", [text for text in KINDS if text not in kinds.UNTRIED])
def test_the_table_is_what_the_probe_finds(text):
    config = kinds.config(KINDS[text])
    found = propose_from(kinds.model_class(KINDS[text]), config)
    if text not in FAMILIES:
        assert found.no_scaling == KNOWN_UNSUPPORTED[text]
        assert found.no_dropping
        assert (found.no_dropping == found.no_scaling) == (text not in NO_DROPPING)
        return
    row = FAMILIES[text]
    assert found.family is not None
    assert (found.no_scaling, bool(found.no_dropping)) == (row.no_scaling, bool(row.no_dropping))
    assert found.family.layers == row.layers
    # A row may name a field that other releases have.
    said = config.to_dict()
    rules = row.rules and {name: rule for name, rule in row.rules.items() if said.get(name) is not None}
    assert found.family.rules == rules
    if not row.no_scaling:
        assert (found.family.pre_norms, found.family.one_plus_weight) == (row.pre_norms, row.one_plus_weight)


@pytest.mark.slow
@pytest.mark.parametrize("text", SCALED)
def test_scaled_equals_hooks_on_the_norms(text):
    plain = build(text)
    scaled = build(text, ln_scaling=True)
    expected_scales = [(layer + 1) ** -0.5 for layer in range(4)]
    assert ln_scales(scaled) == pytest.approx(expected_scales)
    assert list(scaled.state_dict()) == list(plain.state_dict())
    before = logits(plain)
    for layer, scale in zip(layers_of(plain, text), expected_scales, strict=True):
        for name in FAMILIES[text].pre_norms:
            layer.get_submodule(name).register_forward_hook(lambda _m, _a, output, scale=scale: output * scale)
    got = logits(scaled)
    # Many norms compute in float32.
    torch.testing.assert_close(got, logits(plain), rtol=1e-4, atol=1e-4)
    assert (got - before).abs().max() > 1e-3
    assert torch.equal(logits(fold_ln_scaling(scaled)), got)


@pytest.mark.slow
@pytest.mark.parametrize("text", CUT)
def test_dropped_equals_the_model_without_the_layers(text, tmp_path):
    whole = build(text)
    whole.save_pretrained(tmp_path)
    # Some kinds share another's class, which by itself would read their configuration as the other's.
    shared = type(whole.config) is not type(whole).config_class
    loader = AutoModelForCausalLM if shared else type(whole)
    compared = 0
    for dropped in ([1], [0, 2]):
        try:
            cut, info = loader.from_pretrained(
                tmp_path,
                drop_layers=dropped,
                dtype=whole.dtype,
                attn_implementation="eager",
                experts_implementation="eager",
                output_loading_info=True,
            )
        except ValueError as refused:  # where a smaller model of the family could not be what is left
            if not str(refused).startswith("drop_layers: "):
                raise
            continue
        assert not info["missing_keys"]
        assert not info["mismatched_keys"]
        skipping = copy.deepcopy(whole)
        for layer in dropped:
            layers_of(skipping, text)[layer].register_forward_hook(hand_on, with_kwargs=True)
        torch.testing.assert_close(logits(cut.eval()), logits(skipping), rtol=1e-4, atol=1e-4)
        compared += 1
    assert compared


def adds_nothing(_module, _args, output):
    return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "kind"),
    [(text, kind) for text in CUT for kind in ("attention", "mlp") if FAMILIES[text].sublayer(kind)[0]],
)
def test_without_a_sublayer_equals_one_that_adds_nothing(text, kind, tmp_path):
    """Every weight of a layer belongs to one of the two sub-layers, and the norms go with theirs."""
    whole = build(text)
    path, norms = FAMILIES[text].sublayer(kind)
    layers = layers_of(whole, text)
    removable = [at for at in (0, 2, 3) if hasattr(layers[at], path.partition(".")[0])]
    if kind == "attention" and (kinds_of := getattr(whole.config, "layer_types", None)):
        removable = [at for at in removable if "attention" in kinds_of[at] and "linear" not in kinds_of[at]]
    whole.save_pretrained(tmp_path)
    settings = {"dtype": whole.dtype, "attn_implementation": "eager", "experts_implementation": "eager"}
    whole = type(whole).from_pretrained(tmp_path, **settings).eval()
    layers = layers_of(whole, text)
    cut, info = type(whole).from_pretrained(
        tmp_path, **{f"drop_{kind}": removable}, **settings, output_loading_info=True
    )
    assert removable
    assert not info["missing_keys"]
    assert not [name for name in info["unexpected_keys"] if f"{FAMILIES[text].layers}." in name]
    for at in removable:
        left = {name for name, _ in layers_of(cut, text)[at].named_parameters()}
        assert not [name for name in left if name.startswith(f"{path}.")]
        other, others = FAMILIES[text].sublayer({"attention": "mlp", "mlp": "attention"}[kind])
        shared = set(FAMILIES[text].pre_norms) - {*norms, *others}
        if other and hasattr(layers[at], other):  # hybrids have another mixer in some layers
            assert not [name for name in left if not name.startswith(tuple([other, *others, *shared]))]
        layers[at].get_submodule(path).register_forward_hook(adds_nothing)
    assert torch.equal(logits(cut.eval()), logits(whole))
    with torch.no_grad():
        got, expected = (
            [
                (first := model(tokens()[:, :8], use_cache=True)).logits,
                model(tokens()[:, 8:], use_cache=True, past_key_values=first.get("past_key_values")).logits,
            ]
            for model in (cut, whole)
        )
    assert all(map(torch.equal, got, expected))


def hand_on(_layer, args, kwargs, output):
    hidden = args[0] if args else kwargs["hidden_states"]
    return type(output)((hidden, *output[1:])) if isinstance(output, (tuple, list)) else hidden
