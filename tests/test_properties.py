"""Any JSON value in any field of ours gives the right model or one clear error; any name is shown as it is.

What is right is written here anew, from the documentation. The examples are the same in every run; EXAMPLES=10000 tries
more of them.
"""

import io
import json
import math
import os
from contextlib import contextmanager, suppress
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig

import hf_lnscale
import tiny
from hf_lnscale.checkpoints.card import Table, model_card
from hf_lnscale.checkpoints.export import export
from hf_lnscale.checkpoints.hub import push
from hf_lnscale.core.display import one_line, rich_text, terminal
from hf_lnscale.core.record import record
from hf_lnscale.diagnosis.diagnosis import Diagnosis
from hf_lnscale.diagnosis.examine import diagnose
from hf_lnscale.hooks import adapter_note
from hf_lnscale.hooks.trainer import _recorded_step
from hf_lnscale.pruning.plan import PruningPlan, fingerprint
from hf_lnscale.pruning.prune import plan_pruning
from hf_lnscale.pruning.scores import LayerScores

LAYERS = tiny.LAYERS
DEEP = 100_000  # brackets; no parser follows


def examples(number):
    return settings(
        max_examples=int(os.environ.get("EXAMPLES", number)), deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


@contextmanager
def one_clear_error(*names):
    """Within it nothing fails, or an error of a documented type, in a few lines, names one of `names`."""
    said = None
    try:
        yield
    except (ValueError, OSError) as error:
        said = str(error)
    if said is not None:
        assert 0 < len(said.strip()) < 1500
        assert any(name in said for name in names), said


# --- values -----------------------------------------------------------------------------------------------------------

numbers = st.integers() | st.floats() | st.sampled_from([0, 1, -1, 0.5, True, 10**400, 1e308, 1e-320, 10**9, 2**63])
scalars = st.none() | st.booleans() | numbers | st.text(max_size=8)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def nearly(**fields):
    """Objects with some of the fields, most of them valid, and now and then something else in one or beside them."""
    values = {name: valid | anything for name, valid in fields.items()}
    right = st.fixed_dictionaries({}, optional=fields)
    return right | st.fixed_dictionaries({}, optional=values) | st.builds(lambda a, b: a | b, right, right) | anything


layer_lists = st.lists(st.integers(-2, 8), max_size=5)
scalings = nearly(
    exponent=st.sampled_from([0.5, 0, 1, 0.25, 300, 1e308]),
    depths=st.none() | st.lists(st.integers(0, 9), min_size=LAYERS, max_size=LAYERS) | st.just([1, 2, 3]),
    warmup_steps=st.integers(-1, 10),
    schedule=st.sampled_from(["linear", "cosine"]),
    step=st.integers(-1, 10),
)
cuts = nearly(layers=layer_lists, num_hidden_layers=st.integers(LAYERS, 8), base=st.sampled_from(["", "a/b"]))


def is_int(value):
    return type(value) is int


def scales_of(value, layers=LAYERS):
    """The factors that a scaling stands for, equation 8 of the paper; None if it is not valid, [] if there is none."""
    if value is None or value is False:
        return []
    if value is True:
        value = {}
    if not isinstance(value, dict) or set(value) - {"exponent", "depths", "warmup_steps", "schedule", "step"}:
        return None
    exponent, depths = value.get("exponent", 0.5), value.get("depths")
    steps, step, schedule = value.get("warmup_steps", 0), value.get("step", 0), value.get("schedule", "linear")
    if type(exponent) not in (int, float) or not 0 <= exponent < math.inf:
        return None
    if not is_int(steps) or not is_int(step) or not 0 <= step <= steps or schedule not in ("linear", "cosine"):
        return None
    listed = isinstance(depths, list) and depths and all(is_int(one) and one >= 1 for one in depths)
    if depths is not None and not listed:
        return None
    if depths is None or depths == list(range(1, len(depths) + 1)):
        depths = list(range(1, layers + 1))
    if len(depths) != layers:
        return None
    try:
        if any(float(depth) ** -float(exponent) < 2.2250738585072014e-308 for depth in depths):
            return None
    except OverflowError:
        return None
    share = step / steps if steps else 1.0
    share = (1 - math.cos(math.pi * share)) / 2 if schedule == "cosine" and step < steps else share
    return [float(depth) ** -(exponent * share) for depth in depths]


def cut_of(value, layers=LAYERS):
    """The dropped layers; None if not valid, [] if there are none."""
    if value is None:
        return []
    if not isinstance(value, dict) or not isinstance(value.get("layers"), list):
        return None
    gone, number, base = value["layers"], value.get("num_hidden_layers"), value.get("base") or ""
    if not is_int(number) or not all(is_int(one) and 0 <= one < number for one in gone) or not isinstance(base, str):
        return None
    if len(set(gone)) != len(gone) or (gone and number - len(gone) != layers):
        return None
    return sorted(gone) if len(gone) < number else None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.model().save_pretrained(folder)
    return folder


def write_config(folder, **keys):
    tiny.config().save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


# --- config.json ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@examples(400)
@given(value=scalings, key=st.sampled_from(["ln_scaling", "ln_scaling_folded"]))
@example(value={"depths": [10**400] * LAYERS, "exponent": 0}, key="ln_scaling")
@example(value={"exponent": 10**400}, key="ln_scaling")
def test_scaling_in_a_config(folder, value, key):
    expected = scales_of(value)
    write_config(folder, **{key: value})
    with one_clear_error(key):
        config = LlamaConfig.from_pretrained(folder)
        found = record(config)
        scaling = found.active if key == "ln_scaling" else found.folded
        scales = scaling.scales(LAYERS) if scaling else []
        assert expected is not None, "accepted"
        assert scales == pytest.approx(expected, rel=1e-12)
        return
    assert expected is None, "refused"


@pytest.mark.slow
@examples(400)
@given(value=cuts)
@example(value={"layers": [], "num_hidden_layers": 10**12})
@example(value={"layers": [0], "num_hidden_layers": 10**12})
def test_dropped_layers_in_a_config(folder, value):
    expected = cut_of(value)
    write_config(folder, dropped_layers=value)
    with one_clear_error("dropped_layers"):
        found = record(LlamaConfig.from_pretrained(folder)).dropped
        assert expected is not None, "accepted"
        assert (list(found.layers) if found else []) == expected
        assert found is None or found.num_hidden_layers == value["num_hidden_layers"]
        return
    # A model of more layers than this is no model.
    assert expected is None or value["num_hidden_layers"] > 10**6, "refused"


@pytest.mark.slow
@examples(100)
@given(keys=nearly(ln_scaling=scalings, ln_scaling_folded=scalings, dropped_layers=cuts, _ln_scaling_on_disk=anything))
def test_a_model_with_any_keys_is_right_or_refused(folder, keys):
    keys = keys if isinstance(keys, dict) else {}
    keys = {key: value for key, value in keys.items() if key in ("ln_scaling", "ln_scaling_folded", "dropped_layers")}
    active, folded = scales_of(keys.get("ln_scaling")), scales_of(keys.get("ln_scaling_folded"))
    cut = cut_of(keys.get("dropped_layers"))
    write_config(folder, **keys)
    with one_clear_error("ln_scaling", "ln_scaling_folded", "dropped_layers"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert None not in (active, folded, cut), "accepted"
        assert not (active and folded), "accepted"
        assert hf_lnscale.ln_scales(model) == pytest.approx(active or [1.0] * LAYERS, rel=1e-12)
        return
    assert None in (active, folded, cut) or (active and folded), "refused"


@pytest.mark.parametrize("key", ["ln_scaling", "ln_scaling_folded", "dropped_layers"])
@pytest.mark.parametrize("depth", [800, DEEP])
@pytest.mark.parametrize("brackets", ["[]", '{"a":1}'])
def test_a_config_nested_deeply(key, depth, brackets, tmp_path):
    write_config(tmp_path, **{key: "HERE"})
    file = tmp_path / "config.json"
    start, end = ("[", "]") if brackets == "[]" else ('{"a":', "}")
    file.write_text(file.read_text().replace('"HERE"', start * depth + "1" + end * depth))
    with pytest.raises((ValueError, OSError), match=rf"{key}|config\.json"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.slow
@examples(100)
@given(said=st.text(max_size=20) | nearly(ln_scaling=scalings, dropped_layers=cuts).map(json.dumps))
@example(said="[" * DEEP)
def test_the_mark_in_weights(tmp_path_factory, said):
    """Weights whose mark is not that of the configuration beside them are refused; the plain model's mark is `{}`."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.getbasetemp() / "marked"
    if not folder.exists():
        tiny.model().save_pretrained(folder)
    weights = folder / "model.safetensors"
    save_file(load_file(weights), weights, metadata={"format": "pt", "hf_lnscale": said})
    try:
        same = json.loads(said) == {}
    except (ValueError, RecursionError):
        same = False
    with one_clear_error("model.safetensors was saved by a model with"):
        AutoModelForCausalLM.from_pretrained(folder)
        assert same, "accepted"
        return
    assert not same, "refused"


# --- plans and search logs --------------------------------------------------------------------------------------------

PRINT = fingerprint(tiny.config())
figures = nearly(before=st.just(10.0), after=st.just(12.0), healed=st.just(11.0))
fields = {
    "format": st.just(1), "layers": layer_lists, "model": st.just(PRINT) | nearly(num_hidden_layers=st.just(4)),
    "model_name": st.just("name"), "method": nearly(search=st.just("greedy")), "data": anything, "perplexity": figures,
    "steps": st.lists(anything, max_size=2), "heal": st.none() | anything, "notes": anything,
}  # fmt: skip


@pytest.mark.slow
@examples(400)
@given(value=nearly(**fields) | st.fixed_dictionaries(dict.fromkeys(fields, st.nothing()) | fields))
@example(value={"format": 1, "layers": [1], "model": PRINT, "perplexity": None})
@example(value={"format": 1, "layers": [1], "model": PRINT, "perplexity": {"healed": 3.0}})
@example(value={"format": 1, "layers": [1], "model": PRINT, "perplexity": {"before": 0, "after": 1}})
def test_a_plan(tmp_path_factory, value):
    file = tmp_path_factory.getbasetemp() / "plan.json"
    file.write_text(json.dumps(value))
    with one_clear_error("plan.json", "drop_layers"):
        plan = PruningPlan.load(file)
        assert str(plan)
        assert plan.perplexity_increase is None or isinstance(plan.perplexity_increase, float)
        config = LlamaConfig.from_dict(tiny.config().to_dict() | {"drop_layers": str(file)})
        assert value["model"] == PRINT
        gone = value["layers"]
        assert len(set(gone)) == len(gone) < LAYERS
        assert all(is_int(one) and 0 <= one < LAYERS for one in gone)
        assert config.num_hidden_layers == LAYERS - len(gone)
        assert (list(record(config).dropped.layers) if gone else []) == sorted(gone)


@pytest.mark.parametrize("text", ["", "{", "null", "[" * DEEP, '{"a":' * DEEP, "\ufeff{}"])
def test_a_plan_that_is_no_json_object(text, tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"'.*plan\.json' is not a pruning plan: "):
        PruningPlan.load(file)


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A search, the file of its record and its plan."""
    model, ids = tiny.model(), [row for row in tiny.tokens(8, 12).split(2)]
    file = tmp_path_factory.mktemp("search") / "search.json"

    def search(resume=file):
        return plan_pruning(model, ids, num_layers=2, method="greedy", resume=resume, progress=False)

    return search, file, search(), json.loads(file.read_text())


STEPS = st.lists(
    nearly(layers=layer_lists, perplexity=st.just(10.0), calibration_loss=st.just(1.0), healed=st.just(9.0)), max_size=3
)


@pytest.mark.slow
@examples(60)
@given(changes=nearly(key=anything, steps=STEPS, before=st.just(3.0)) | anything)
def test_the_record_of_a_search(searched, changes):
    """With anything else in it, the search goes on, if only by what is plausible there, or says why not."""
    search, file, plan, content = searched
    changed = content | changes if isinstance(changes, dict) else changes
    file.write_text(json.dumps(changed))
    with one_clear_error("search.json"):
        found = search()
        assert len(found.layers) == 2
        assert all(isinstance(value, (int, float)) for value in found.perplexity.values())
        if changed == content:
            assert found == plan


# --- adapters, diagnoses, evaluations, runs ---------------------------------------------------------------------------


@pytest.mark.slow
@examples(300)
@given(
    mapping=anything
    | nearly(hf_lnscale=nearly(ln_scaling=scalings, ln_scaling_folded=scalings, dropped_layers=cuts) | anything)
)
def test_the_note_of_an_adapter(folder, mapping):
    config = tiny.config()
    adapter = {"base_model_name_or_path": str(folder), "auto_mapping": mapping}
    with one_clear_error("adapter", "base"):
        found = adapter_note.note(adapter)
        restored = adapter_note.keywords(adapter, config)
        if found is None:
            assert restored == {}
            return
        model = record(LlamaConfig.from_dict(config.to_dict() | restored))
        assert (model.active, model.folded) == (found.active, found.folded)
        assert (model.dropped and model.dropped.layers) == (found.dropped and found.dropped.layers)
    with one_clear_error("adapter", "base"):
        adapter_note.require_base(adapter, "an adapter", config)


@pytest.fixture(scope="module")
def diagnosis():
    return diagnose(tiny.model(), tiny.tokens(6, 12), progress=False)


@pytest.mark.slow
@examples(100)
@given(data=st.data())
def test_a_diagnosis(diagnosis, tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "diagnosis.json"
    content = json.loads(diagnosis.to_json())
    for key in data.draw(st.lists(st.sampled_from(sorted(content)), max_size=2)):
        content[key] = data.draw(anything)
    file.write_text(json.dumps(data.draw(anything) if data.draw(st.integers(0, 9)) == 0 else content))
    with one_clear_error("diagnosis.json"):
        Diagnosis.load(file)


@pytest.mark.slow
@examples(100)
@given(content=anything | nearly(markdown=st.text(), settings=nearly(versions=nearly(torch=st.just("2")))))
def test_an_evaluation(folder, content):
    write_config(folder)
    (folder / "evaluation.json").write_text(json.dumps(content))
    with one_clear_error("evaluation.json"):
        push(folder, "user/model", dry_run=True)
    (folder / "evaluation.json").unlink()


@pytest.mark.slow
@examples(200)
@given(
    content=anything
    | nearly(method=st.sampled_from(["perplexity", "angular"]), scores=st.lists(numbers, max_size=3), model=anything)
)
def test_scores(tmp_path_factory, content):
    about = {"method": "perplexity", "model": "", "data": None, "baseline": None, "tokens": 3, "scores": [1.0, None]}
    file = tmp_path_factory.getbasetemp() / "scores.json"
    file.write_text(json.dumps(about | content if isinstance(content, dict) else content))
    with one_clear_error("scores.json"):
        LayerScores.load(file)


@pytest.mark.slow
@examples(200)
@given(content=anything | nearly(weight_map=st.dictionaries(st.text(), st.text() | anything, max_size=3)))
@example(content={"weight_map": {"a": "../plan.json"}})
@example(content={"weight_map": {"a": "/etc/hostname"}})
def test_an_index_of_weights(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "indexed"
    if not folder.exists():
        tiny.model(ln_scaling=True).save_pretrained(folder)
        (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    with one_clear_error("indexed"):
        export(folder, folder.parent / "exported", progress=False)
        raise AssertionError("accepted")
    assert not (folder.parent / "exported").exists()


@pytest.mark.slow
@examples(200)
@given(
    name=st.sampled_from(["run.json", "metrics.json"]),
    content=anything | nearly(identity=anything, steps=st.integers(), length=st.just([6, 3.0])),
    raw=st.none() | st.text(),
)
def test_the_files_of_a_run(tmp_path_factory, name, content, raw):
    pytest.importorskip("trl", minversion="1.9")
    from hf_lnscale.training.recipe_run import Run

    folder = tmp_path_factory.getbasetemp() / "run"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").touch()
    one = Run.__new__(Run)
    one.recipe, one.folder, one.identity = "sft", folder, {"recipe": "sft"}
    one.training = type("Training", (), {"resume_from_checkpoint": "true", "max_steps": 6, "num_train_epochs": 3.0})()
    one.training.process_index = 0
    for file, text in (("run.json", {"identity": one.identity}), ("metrics.json", {})):
        (folder / file).write_text(json.dumps(text))
    (folder / name).write_text(json.dumps(content) if raw is None else raw, errors="surrogatepass")
    with one_clear_error(str(folder)), suppress(SystemExit):  # it is finished
        one._checkpoint()
        assert name == "metrics.json" or content["identity"] == one.identity


@pytest.mark.slow
@examples(200)
@given(state=nearly(Callback=nearly(attributes=nearly(ln_scaling=scalings), args=anything)) | anything)
def test_the_state_of_a_warmup(folder, state):
    config = tiny.config(ln_scaling={"warmup_steps": 8})
    saved = folder / "checkpoint-1"
    saved.mkdir(exist_ok=True)
    (saved / "trainer_state.json").write_text(json.dumps({"stateful_callbacks": state}))
    with one_clear_error("trainer_state.json"):
        step = _recorded_step(config, saved)
        assert step is None or step >= 0


# --- names ------------------------------------------------------------------------------------------------------------

names = st.text(min_size=1) | st.text(st.sampled_from("[]<>&|`*_~\\#/\"'!(){}-=+.\n\r\t\x00\x1b\u2028 a1"), min_size=1)


def visible(name):
    """A name as the documentation says that it is shown: what cannot be printed as Python's escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


@examples(300)
@given(name=names)
def test_names_in_a_terminal(name):
    console = Console(file=io.StringIO(), width=4000, color_system=None, legacy_windows=False)
    console.print(rich_text(one_line(name)), soft_wrap=True)
    console.print(terminal(["", one_line(name)], [[one_line(name), "1"]], title=one_line(name)))
    printed = console.file.getvalue()
    assert printed.count(visible(name).strip()) >= 4
    assert not [c for c in printed if not c.isprintable() and c != "\n"]


@pytest.mark.slow
@examples(300)
@given(name=names)
@example(name="* *")
@example(name="1. a")
@example(name="2)")
@example(name="## a")
@example(name="a #")
@example(name=">a")
@example(name="    a")
@example(name="-")
@example(name="---")
@example(name="===")
@example(name="http://a.b www.a.b")
def test_names_in_a_card(name):
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark").enable("table").enable("strikethrough")
    table = Table(("", one_line(name)), [(one_line(name), "1")], note=name, heading=name)
    card = str(model_card(name, notes=[name], parts=[table]))
    tokens = parser.parse(card.split("---\n", 2)[2])
    inline = [token for token in tokens if token.type == "inline"]
    text = ["".join(child.content for child in token.children) for token in inline]
    kinds = {child.type for token in inline for child in token.children}
    assert kinds <= {"text", "text_special"}
    wanted = visible(name).strip()
    assert sum(wanted == one.strip() for one in text) >= 5
    assert {token.type for token in tokens} <= {
        f"{kind}_{side}" for kind in ("heading", "paragraph", "table", "thead", "tbody", "tr", "th", "td")
        for side in ("open", "close")
    } | {"inline"}  # fmt: skip


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.slow
@examples(30)
@given(name=names)
@example(name="</script><script>alert(1)</script>")
@example(name="<!--")
def test_names_in_a_report(diagnosis, name, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "report.html"
    named = replace(diagnosis, model={**diagnosis.model, "name": name})
    named.report(file)
    page, harmless = Page(file.read_text(encoding="utf-8")), Page("")
    replace(diagnosis, model={**diagnosis.model, "name": "harmless"}).report(file)
    harmless = Page(file.read_text(encoding="utf-8"))
    assert page.tags == harmless.tags
    assert any(one.strip() == visible(name).strip() for one in page.text)
