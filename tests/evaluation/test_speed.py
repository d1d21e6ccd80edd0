"""Speed and memory of checkpoints, measured in processes that take turns."""

import contextlib
import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tiny
from hf_lnscale.checkpoints.names import Placement
from hf_lnscale.evaluation import speed
from hf_lnscale.evaluation.speed import Timing, measure, relative_change

CPU = Placement(device="cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speed")
    tiny.model(max_position_embeddings=64).save_pretrained(folder)
    return folder


def test_numbers_that_cannot_be_are_refused_before_a_process_starts(tmp_path):
    with pytest.raises(ValueError, match="repeats must be an integer >= 1, got 0"):
        measure(tmp_path, repeats=0)


@pytest.mark.slow
def test_two_checkpoints_in_turn(checkpoint, tmp_path, monkeypatch):
    """With a `typer.py` in the current folder, which must not be run."""
    (tmp_path / "typer.py").write_text("raise SystemExit('code of the current folder was run')")
    (tmp_path / "json.py").write_text("raise SystemExit('code of the current folder was run')")
    (tmp_path / "statistics.py").write_text("raise SystemExit('code of the current folder was run')")
    monkeypatch.chdir(tmp_path)
    tiny.model(max_position_embeddings=64, drop_layers=[1]).save_pretrained(tmp_path / "cut")
    started, turns = speed._started, []

    @contextlib.contextmanager
    def noting(job):
        with started(job) as answer:

            def noted(*request):
                turns.extend(["cut" if job["checkpoint"].endswith("cut") else "whole"] if request else [])
                return answer(*request)

            yield noted

    monkeypatch.setattr(speed, "_started", noting)
    whole, cut = measure(checkpoint, tmp_path / "cut", placement=CPU, prompt_tokens=8, new_tokens=4, repeats=3)
    layer = sum(p.numel() for p in tiny.model().model.layers[1].parameters())
    assert whole.parameters - cut.parameters == layer
    for timing in (whole.prefill_tokens_per_second, cut.decode_tokens_per_second):
        assert 0 < timing.lowest <= timing.median <= timing.highest
    # Tokens over seconds: the same run gives both figures.
    assert whole.prefill_tokens_per_second.highest == pytest.approx(8 / whole.first_token_seconds.lowest)
    assert whole.peak_bytes >= whole.load_peak_bytes > 0
    # The first of them in a turn, which may find the machine in another state, is not always the same.
    assert turns == ["cut", "whole", "whole", "cut"] * 2


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="compares with /proc/self/statm")
def test_peak_memory_is_in_bytes(run_python):
    """What is in use at the moment is counted by the kernel in pages; the peak is no less, and here little more."""
    code = """
    import os
    from hf_lnscale.evaluation.speed import peak_memory
    held = b"x" * 2**29
    now = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert 0.995 * now < peak_memory() < 1.01 * now, (now, peak_memory())
    """
    run_python(code, plugin=True)


@pytest.mark.slow
def test_a_process_that_fails_says_why(tmp_path):
    tiny.config().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(RuntimeError, match=r"measuring .* failed: .*[Hh]eader"):
        measure(tmp_path, placement=CPU)


def test_a_range_that_overlaps_is_no_change():
    reference = Timing.of([9.0, 10.0, 10.0, 11.0])
    assert relative_change(Timing.of([12.0, 13.0, 13.0, 14.0]), reference) == pytest.approx(0.3)
    assert relative_change(Timing.of([7.0, 8.0, 8.0, 8.9]), reference) == pytest.approx(-0.2)
    assert relative_change(Timing.of([11.0, 13.0, 13.0, 14.0]), reference) is None  # touching ranges overlap
    assert relative_change(Timing.of([8.0, 8.5, 8.5, 9.0]), reference) is None


def test_few_runs_and_runs_that_took_no_turns_are_no_change():
    """Ranges of n runs of the same thing are apart by chance in 2 of (2n over n) orders: counted here."""
    for runs, told in {2: False, 3: False, 4: True, 5: True}.items():
        orders = list(itertools.combinations(range(2 * runs), runs))
        apart = sum(order in (tuple(range(runs)), tuple(range(runs, 2 * runs))) for order in orders)
        assert (apart / len(orders) < 0.05) == told
        fast, slow = Timing.of([20.0 + i for i in range(runs)]), Timing.of([10.0 + i for i in range(runs)])
        assert (relative_change(fast, slow) is not None) == told
    assert relative_change(dataclasses.replace(fast, in_turn=False), slow) is None
    assert relative_change(fast, Timing.of([10.0] * 5, in_turn=False)) is None


@pytest.mark.slow
def test_models_that_do_not_fit_together_say_so(checkpoint, monkeypatch):
    monkeypatch.setattr(speed, "_fit", lambda *_: False)
    for found in measure(checkpoint, checkpoint, placement=CPU, prompt_tokens=4, new_tokens=2, repeats=1):
        assert not found.decode_tokens_per_second.in_turn
        assert found.decode_tokens_per_second.runs == 1


@pytest.mark.slow
def test_the_processes_end_with_the_one_that_started_them(checkpoint):
    code = """
import sys
from hf_lnscale.checkpoints.names import Placement
from hf_lnscale.evaluation.speed import measure
measure(sys.argv[1], placement=Placement(device="cpu"), prompt_tokens=4, new_tokens=4, repeats=10**9)
"""
    parent = subprocess.Popen([sys.executable, "-c", code, str(checkpoint)])
    child = None
    for _ in range(600):
        found = subprocess.run(["pgrep", "-P", str(parent.pid)], capture_output=True, text=True).stdout.split()
        if found:
            child = int(found[0])
            break
        time.sleep(0.1)
    assert child is not None
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    for _ in range(600):
        try:
            os.kill(child, 0)
            state = Path(f"/proc/{child}/stat").read_text().split()[2]
        except (ProcessLookupError, FileNotFoundError):
            return
        if state == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the child goes on")
