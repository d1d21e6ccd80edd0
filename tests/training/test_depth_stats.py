"""Depth statistics of real training runs, against computations of the same in float64 from outside."""

import copy
import json
import math
import os
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

import processes
import tiny
from hf_lnscale import diagnose
from hf_lnscale.pruning.scores import score_layers
from hf_lnscale.training import DepthStatsCallback, plot_depth_stats, read_depth_stats
from oracles import decoder_layers

TOKENIZER = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 2} | {f"w{i}": i for i in range(3, 90)}, unk_token="<pad>"))
TOKENIZER.pre_tokenizer = pre_tokenizers.Whitespace()
LANGUAGE = Dataset.from_dict({"text": [" ".join(f"w{i}" for i in row) for row in tiny.tokens(8, 9).tolist()]})
MEASURES = ["residual_variance", "angular_distance", "gradient_norm"]


def examples(count=8, length=12, pad=False, packed=False):
    """Rows for a Trainer; with padding on either side, or with two sequences in each row."""
    rows = []
    for number, ids in enumerate(tiny.tokens(count, length).tolist()):
        row = {"input_ids": ids, "labels": list(ids)}
        if pad:
            gone = range(number % 5) if number % 2 else range(length - number % 5, length)
            row["attention_mask"] = [int(place not in gone) for place in range(length)]
            row["labels"] = [-100 if place in gone else token for place, token in enumerate(ids)]
        if packed:
            first = 3 + number % 4
            row["position_ids"] = [*range(first), *range(length - first)]
            row["labels"][first] = -100
        rows.append(row)
    return Dataset.from_list(rows)


def trainer(
    model, data, folder, callback=True, every=2, skip_tokens=1, more=(), cls=Trainer, evaluated=None, **settings
):
    given = {
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "report_to": [],
        "max_grad_norm": 0,
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
    }
    args = TrainingArguments(folder, **(given | settings))
    made = cls(model, args, train_dataset=data, eval_dataset=evaluated, callbacks=list(more))
    if callback:
        made.add_callback(DepthStatsCallback(made, every, skip_tokens))
    return made


def expected(model, data, skip_tokens=1):
    """Of all examples at once, in float64: pooled variance, mean angle, and the gradient of the mean loss."""
    model = copy.deepcopy(model).double().train()
    model.gradient_checkpointing_disable()
    batch = {name: torch.tensor(data[name]) for name in data.column_names}
    stream = []
    hooks = [decoder_layers(model)[0].register_forward_pre_hook(lambda layer, args: stream.append(args[0]))]
    hooks += [
        layer.register_forward_hook(lambda layer, args, out: stream.append(out)) for layer in decoder_layers(model)
    ]
    model(**batch, use_cache=False).loss.backward()  # with a cache, packed sequences see each other
    for hook in hooks:
        hook.remove()
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    positions = batch["position_ids"] if "position_ids" in batch else torch.tensor(positions_of(data))
    picked = real & (positions >= skip_tokens)
    variance, angle, gradient = [], [], []
    for before, after, layer in zip(stream, stream[1:], decoder_layers(model), strict=False):
        before, after = before.detach()[picked], after.detach()[picked]
        variance.append(after.var(correction=0).item())
        cosine = nn.functional.cosine_similarity(before, after, dim=-1)
        angle.append((cosine.clamp(-1, 1).acos() / math.pi).mean().item())
        squares = sum(p.grad.square().sum() for p in layer.parameters() if p.grad is not None)
        gradient.append(math.sqrt(squares))
    return dict(zip(MEASURES, (variance, angle, gradient), strict=True))


def positions_of(data):
    """Of each token in its sequence, counted from the first that is real."""
    rows = []
    for row in data:
        at, found = -1, []
        for real in row.get("attention_mask", [1] * len(row["input_ids"])):
            at += real
            found.append(at)
        rows.append(found)
    return rows


def logged(run, step=1):
    steps, tensors = read_depth_stats(run)
    return {measure: values[steps.index(step)].tolist() for measure, values in tensors.items()}


def assert_agree(got, wanted, rel=2e-4):
    for measure in MEASURES:
        assert got[measure] == pytest.approx(wanted[measure], rel=rel), measure


CASES = {
    "plain": ({}, {}, {}),
    "scaled": ({"ln_scaling": True}, {}, {}),
    "padding": ({}, {"pad": True}, {}),
    "packed": ({"ln_scaling": True}, {"packed": True}, {}),
    "checkpointing": ({}, {"pad": True}, {"gradient_checkpointing": True}),
    "checkpointing, reentrant": (
        {},
        {"pad": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ),
    "one batch": ({}, {"pad": True}, {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}),
}


@pytest.mark.slow
@pytest.mark.parametrize("skip_tokens", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_a_step_against_float64(case, skip_tokens, tmp_path):
    keywords, rows, settings = CASES[case]
    model, data = tiny.model(**keywords), examples(**rows)
    wanted = expected(model, data, skip_tokens)
    run = trainer(model, data, tmp_path, skip_tokens=skip_tokens, **settings)
    run.train()
    assert_agree(logged(run), wanted)


@pytest.mark.slow
def test_small_angles_keep_their_digits(tmp_path):
    """arccos of a cosine next to 1 has none left in float32."""
    model = tiny.model()
    with torch.no_grad():
        for layer in decoder_layers(model):
            layer.self_attn.o_proj.weight.mul_(1e-4)
            layer.mlp.down_proj.weight.mul_(1e-4)
    wanted = expected(model, examples())
    assert max(wanted["angular_distance"]) < 1e-4
    run = trainer(model, examples(), tmp_path)
    run.train()
    assert_agree(logged(run), wanted, rel=1e-2)


@pytest.mark.slow
def test_the_definitions_are_those_of_the_other_measurements(tmp_path):
    model, data = tiny.model(), examples()
    ids = torch.tensor(data["input_ids"])
    found = diagnose(model, ids, loss=False, jacobian=False, progress=False)
    variance, skipped = (found.values(f"residual.{name}") for name in ("variance", "variance_without_first"))
    angle = score_layers(model, ids, "angular", tokens="all", progress=False).layers.tolist()
    run = trainer(copy.deepcopy(model), data, tmp_path, skip_tokens=0)
    run.train()
    assert logged(run)["residual_variance"] == pytest.approx(variance, rel=1e-4)
    assert logged(run)["angular_distance"] == pytest.approx(angle, rel=1e-4)
    run = trainer(model, data, tmp_path)
    run.train()
    assert logged(run)["residual_variance"] == pytest.approx(skipped, rel=1e-4)


@pytest.mark.slow
def test_bf16(tmp_path):
    model, data = tiny.model(ln_scaling=True), examples()
    wanted = expected(model, data)
    run = trainer(model, data, tmp_path, bf16=True)
    run.train()
    assert_agree(logged(run), wanted, rel=3e-2)


@pytest.mark.slow
def test_the_gradient_is_the_one_that_the_optimizer_gets(tmp_path):
    """Clipped, if it is clipped; of the adapter alone, if only an adapter is trained."""
    model, data = tiny.model(), examples()
    wanted = expected(model, data)["gradient_norm"]
    run = trainer(copy.deepcopy(model), data, tmp_path, max_grad_norm=0.1, logging_steps=1)
    run.train()
    total = next(entry["grad_norm"] for entry in run.state.log_history if "grad_norm" in entry)
    assert total > 0.1
    assert logged(run)["gradient_norm"] == pytest.approx([value * 0.1 / total for value in wanted], rel=1e-3)

    config = LoraConfig(target_modules=["q_proj"], layers_to_transform=[1, 3], init_lora_weights=False)
    run = trainer(get_peft_model(model, config), data, tmp_path)
    keep = {}
    run.add_callback(Keep(keep))
    run.train()
    found = logged(run)
    assert [math.isnan(value) for value in found["gradient_norm"]] == [True, False, True, False]
    for layer in (1, 3):
        squares = sum(grad.square().sum() for name, grad in keep.items() if f"layers.{layer}." in name)
        assert found["gradient_norm"][layer] == pytest.approx(math.sqrt(squares), rel=1e-5)
    assert not any(map(math.isnan, found["residual_variance"]))


class Keep(TrainerCallback):
    def __init__(self, into):
        self.into = into

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.into |= {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
def test_passes_that_are_not_trained_on_do_not_count(tmp_path):
    """A reference pass, a generation, and an evaluation at every step."""

    class Other(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            with torch.no_grad():
                model(input_ids=tiny.tokens(seed=5))
                model.generate(tiny.tokens(2, 4), max_new_tokens=2, do_sample=False)
            return super().compute_loss(model, inputs, *args, **kwargs)

    model, data = tiny.model(), examples()
    wanted = expected(model, data)
    evaluation = {"evaluated": examples(4), "eval_strategy": "steps", "eval_steps": 1}
    run = trainer(model, data, tmp_path, cls=Other, **evaluation)
    run.train()
    assert_agree(logged(run), wanted)


class Watch(TrainerCallback):
    """How many hooks there are while a step runs."""

    def __init__(self):
        self.hooks = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.hooks.append(sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()))


@pytest.mark.slow
def test_other_steps_run_without_hooks_and_the_training_is_the_same(tmp_path):
    watch = Watch()
    model, data = tiny.model(), examples()
    run = trainer(model, data, tmp_path, every=3, max_steps=7, more=[watch])
    run.train()
    assert read_depth_stats(run)[0] == [1, 3, 6]
    assert [count > 0 for count in watch.hooks] == [True, False, True, False, False, True, False]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    plain = tiny.model()
    trainer(plain, data, tmp_path, callback=False, max_steps=7).train()
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model(in_place, tmp_path):
    """The measured steps run eagerly; the others run what was compiled, once."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, data = tiny.model(), examples()
    eager = trainer(copy.deepcopy(model), data, tmp_path, every=3, max_steps=7)
    eager.train()
    compiled = {} if in_place else {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    if in_place:
        model.compile(backend="aot_eager")
    run = trainer(model, data, tmp_path, every=3, max_steps=7, **compiled)
    run.train()
    for step in (1, 3, 6):
        assert_agree(logged(run, step), logged(eager, step), rel=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch._dynamo.eval_frame._stance.stance == "default"


@pytest.mark.slow
def test_resumed_the_curve_goes_on(tmp_path):
    settings = {"every": 2, "save_strategy": "steps", "save_steps": 3}
    trainer(tiny.model(), examples(), tmp_path, max_steps=3, **settings).train()
    run = trainer(tiny.model(), examples(), tmp_path, max_steps=6, **settings)
    run.train(resume_from_checkpoint=True)
    assert read_depth_stats(run)[0] == [1, 2, 4, 6]
    steps, tensors = read_depth_stats(tmp_path)  # of the last checkpoint
    assert steps == [1, 2, 4, 6]
    assert tensors["residual_variance"].shape == (4, 4)
    assert read_depth_stats(run.state.log_history)[0] == read_depth_stats(tmp_path / "checkpoint-6")[0]


@pytest.mark.slow
def test_tensorboard(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    run = trainer(tiny.model(), examples(), tmp_path, max_steps=4, report_to=["tensorboard"])
    run.train()
    events = EventAccumulator(str(next((tmp_path / "runs").rglob("events*")).parent)).Reload()
    steps, tensors = read_depth_stats(run)
    for measure in MEASURES:
        for layer in range(4):
            scalars = events.Scalars(f"train/depth/{measure}/layer_{layer:02}")
            assert [scalar.step for scalar in scalars] == steps == [1, 2, 4]
            assert [scalar.value for scalar in scalars] == pytest.approx(tensors[measure][:, layer].tolist(), rel=1e-6)


@pytest.mark.slow
def test_trackio(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)  # the folder is read on import
    pytest.importorskip("trackio")
    import sqlite3

    run = trainer(
        tiny.model(),
        examples(),
        tmp_path,
        max_steps=4,
        report_to=["trackio"],
        project="depth",
        run_name="a-run",
        trackio_space_id=None,
        trackio_static_space_id=False,
    )
    run.train()
    tensors = read_depth_stats(run)[1]
    databases = list((tmp_path / "trackio").rglob("*.db"))
    rows = [
        json.loads(row[0])
        for database in databases
        for row in sqlite3.connect(database).execute("select metrics from metrics order by id")
    ]
    for measure in MEASURES:
        name = f"train/depth/{measure}/layer_03"
        assert [row[name] for row in rows if name in row] == pytest.approx(tensors[measure][:, 3].tolist())


@pytest.mark.slow
def test_the_console_is_spared_and_metrics_of_trl_are_not_flushed(tmp_path, capsys):
    config = SFTConfig(
        tmp_path,
        max_steps=4,
        logging_steps=2,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        per_device_train_batch_size=2,
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER, eos_token="</s>", pad_token="<pad>")
    run = SFTTrainer(tiny.model(), config, train_dataset=LANGUAGE, processing_class=tokenizer)
    run.add_callback(DepthStatsCallback(run, 2))
    run.train()
    assert read_depth_stats(run)[0] == [1, 2, 4]
    regular = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in regular] == [2, 4]
    assert all("mean_token_accuracy" in entry for entry in regular)
    printed = "".join(capsys.readouterr())
    assert "mean_token_accuracy" in printed
    assert "depth/" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be an integer >= 1, got 0"),
        ({"every_n_steps": 2.5}, "every_n_steps must be an integer >= 1, got 2.5"),
        ({"skip_tokens": -1}, "skip_tokens must be an integer >= 0, got -1"),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        DepthStatsCallback(trainer(tiny.model(), examples(), tmp_path, callback=False), **arguments)


@pytest.mark.slow
def test_the_plot(tmp_path):
    runs = {}
    for name, keywords in {"Pre-LN": {}, "LNS": {"ln_scaling": True}}.items():
        runs[name] = trainer(
            tiny.model(**keywords), examples(), tmp_path / name, max_steps=4, save_strategy="steps", save_steps=4
        )
        runs[name].train()
    figure = plot_depth_stats(runs, tmp_path / "both.png")
    assert (tmp_path / "both.png").stat().st_size > 10_000
    axes = figure.axes
    assert [ax.get_title(loc="left") for ax in axes[:2]] == ["Pre-LN", "LNS"]
    line = axes[1].lines[-1]  # the last measured step of the second run, residual variance
    assert line.get_ydata().tolist() == read_depth_stats(tmp_path / "LNS")[1]["residual_variance"][-1].tolist()
    plot_depth_stats(tmp_path / "LNS")
    with pytest.raises(ValueError, match="no depth statistics"):
        plot_depth_stats(trainer(tiny.model(), examples(), tmp_path, callback=False))
    with pytest.raises(FileNotFoundError):
        read_depth_stats(tmp_path / "nowhere")


# --- two processes ----------------------------------------------------------------------------------


def distributed_worker(rank, port, folder):
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
    }
    data = examples(pad=True)
    run = trainer(
        tiny.model(ln_scaling=True), data, folder, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    run.train()
    found = {"ddp": logged(run)}

    # accelerate wraps in FSDP2 on an accelerator only: here by hand, and the callback's events too.
    model = tiny.model(ln_scaling=True).train()
    for layer in decoder_layers(model):
        fully_shard(layer)
    fully_shard(model)
    callback = DepthStatsCallback(run)
    run.state.log_history.clear()
    run.state.global_step = 0
    arguments = (run.args, run.state, run.control)
    callback.on_step_begin(*arguments, model=model)
    mine = {name: torch.tensor(data[name])[rank * 4 : rank * 4 + 4] for name in data.column_names}
    tokens = sum(label != -100 for row in data["labels"] for label in row[1:])
    for half in (slice(0, 2), slice(2, 4)):
        batch = {name: values[half] for name, values in mine.items()}
        loss = model(**batch, num_items_in_batch=torch.tensor(tokens)).loss * 2  # averaged over two processes
        loss.backward()
    callback.on_pre_optimizer_step(*arguments, model=model)
    run.state.global_step = 1
    callback.on_step_end(*arguments, model=model)
    found["fsdp2"] = logged(run)
    torch.save(found, f"{folder}/{rank}")
    dist.destroy_process_group()
    processes.leave()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("found")
    mp.spawn(distributed_worker, (processes.free_port(), str(folder)), nprocs=2)
    return [torch.load(folder / str(rank)) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_processes_log_what_one_would(way, two_processes):
    """Of the whole batch, on every process; with more padding on one than on the other."""
    wanted = expected(tiny.model(ln_scaling=True), examples(pad=True))
    for found in two_processes:
        assert_agree(found[way], wanted)
