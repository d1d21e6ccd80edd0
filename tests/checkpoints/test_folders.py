"""Output folders: complete or absent, nothing of others deleted, and what a killed run leaves found by the next."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hf_lnscale.checkpoints.folders import atomic_directory, require_free, write_atomically


def write(target, force=False, content="new"):
    require_free(target, (), str(target), force)
    with atomic_directory(target, force) as partial:
        (partial / "config.json").write_text(content)


def checkpoint(folder, content="old", **more):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(content)
    for name, text in more.items():
        (folder / name).write_text(text)
    return folder


def test_force_replaces_a_checkpoint_and_nothing_else(tmp_path):
    target = checkpoint(tmp_path / "out")
    with pytest.raises(FileExistsError, match=r"is not empty"):
        write(target)
    write(target, force=True)
    assert (target / "config.json").read_text() == "new"
    assert os.listdir(tmp_path) == ["out"]
    (target / "src").mkdir()
    (target / ".git").mkdir()
    with pytest.raises(FileExistsError, match=r"contains '\.git', which is not part of a checkpoint"):
        write(target, force=True)
    assert sorted(os.listdir(target)) == [".git", "config.json", "src"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not a checkpoint"):
        write(other, force=True)


@pytest.mark.parametrize("target", [".", ".."])
def test_the_current_folder_and_those_above_are_never_written(target, tmp_path, monkeypatch):
    here = checkpoint(tmp_path / "project" / "here")
    checkpoint(tmp_path / "project" / "more")
    monkeypatch.chdir(here)
    with pytest.raises(ValueError, match="is or contains the current folder"):
        write(Path(target).resolve(), force=True)
    assert (here / "config.json").read_text() == "old"


def test_a_name_that_is_too_long_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="name longer than 200 bytes"):
        write(tmp_path / ("x" * 201))
    write(tmp_path / ("x" * 200))


@pytest.mark.parametrize("force", [False, True])
def test_what_appears_meanwhile_is_kept_and_so_is_the_result(force, tmp_path):
    target = tmp_path / "out"

    def run():
        with atomic_directory(target, force) as partial:
            (partial / "config.json").write_text("hours of work")
            target.mkdir()
            (target / "thesis.tex").write_text("theirs")

    with pytest.raises(FileExistsError, match="has appeared in the meantime") as caught:
        run()
    assert (target / "thesis.tex").read_text() == "theirs"
    (kept,) = (path for path in tmp_path.iterdir() if path != target)
    assert (kept / "config.json").read_text() == "hours of work"
    assert str(kept) in str(caught.value)


def test_a_failure_leaves_what_was_there(tmp_path):
    target = checkpoint(tmp_path / "out")
    with pytest.raises(KeyError), atomic_directory(target, force=True):
        raise KeyError
    assert (target / "config.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("owner", "name", "nth", "found"),
    [(Path, "mkdir", 2, "old"), (os, "replace", 1, "old"), (os, "replace", 2, "new"), (shutil, "rmtree", 1, "new")],
)
def test_sigterm_leaves_one_or_the_other(owner, name, nth, found, tmp_path, monkeypatch):
    """It raises SystemExit anywhere: here, right after a folder is made, after a rename, or amid the removal."""
    target, original, calls = checkpoint(tmp_path / "out"), getattr(owner, name), []

    def stopped(*args, **kwargs):
        calls.append(args)
        if name != "rmtree" or len(calls) != nth:
            original(*args, **kwargs)
        if len(calls) == nth:
            raise SystemExit(143)

    monkeypatch.setattr(owner, name, stopped)
    with pytest.raises(SystemExit), atomic_directory(target, force=True) as partial:
        (partial / "config.json").write_text("new")
    assert len(calls) >= nth
    assert (target / "config.json").read_text() == found
    assert os.listdir(tmp_path) == ["out"]


def test_a_text_that_is_not_written_leaves_the_old_one(tmp_path):
    (tmp_path / "text").write_text("old")
    with pytest.raises(UnicodeEncodeError):  # amid the writing, as on a full disk
        write_atomically(tmp_path / "text", "new" * 10**5 + "\ud800")
    assert (tmp_path / "text").read_text() == "old"
    assert os.listdir(tmp_path) == ["text"]


KILLED = """
import os, signal, sys
from pathlib import Path
import hf_lnscale.checkpoints.folders as folders
target, moment = Path(sys.argv[1]), sys.argv[2]
replace, calls = os.replace, []
def killed(*paths):
    calls.append(paths)
    if moment == f"before rename {len(calls)}":
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths)
    if moment == f"after rename {len(calls)}":
        os.kill(os.getpid(), signal.SIGKILL)
folders.os.replace = killed
with folders.atomic_directory(target, force=True) as partial:
    (partial / "config.json").write_text("new")
    if moment == "while writing":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["while writing", "before rename 1", "after rename 1", "after rename 2"])
def test_the_next_run_cleans_up_after_a_killed_one(moment, tmp_path, caplog):
    """`after rename 1` is the moment at which nothing is under the name."""
    target = checkpoint(tmp_path / "out")
    done = subprocess.run([sys.executable, "-c", KILLED, str(target), moment], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(os.listdir(tmp_path)) == (1 if moment == "after rename 1" else 2)
    with pytest.raises(FileExistsError):  # the old folder or the new one is there, so it takes force
        write(target)
    assert (target / "config.json").read_text() == ("new" if moment == "after rename 2" else "old")
    assert os.listdir(tmp_path) == ["out"]
    assert "left behind by a killed run" in caplog.text
    assert ("restored" in caplog.text) == (moment == "after rename 1")


@pytest.mark.slow
def test_a_run_that_goes_on_is_not_cleaned_up(tmp_path):
    target = tmp_path / "out"
    with atomic_directory(target) as partial:
        (partial / "config.json").write_text("first")
        code = "import sys; from pathlib import Path; from hf_lnscale.checkpoints.folders import require_free;"
        code += "require_free(Path(sys.argv[1]), (), 'out', False)"
        subprocess.run([sys.executable, "-c", code, str(target)], check=True)
    assert (target / "config.json").read_text() == "first"
