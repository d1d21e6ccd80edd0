"""`hf-lnscale push`: what would be uploaded, and what is."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModelForCausalLM

import hf_lnscale
import tiny
from hf_lnscale.checkpoints.hub import push

EVALUATION = {
    "format": 1,
    "settings": {"versions": {"hf_lnscale": "0.1.0", "torch": "2.13.0"}},
    "markdown": "|  | base | this |\n| --- | ---: | ---: |\n| perplexity | 39.75 ± 0.51 | 44.81 ± 0.60 |",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints by name, each with what a training run leaves beside it."""
    folder = tmp_path_factory.mktemp("hub")
    plain = tiny.model()
    plain.save_pretrained(folder / "plain")
    tiny.model(ln_scaling=True).save_pretrained(folder / "scaled")
    hf_lnscale.fold_ln_scaling(tiny.model(ln_scaling=True)).save_pretrained(folder / "folded")
    hf_lnscale.drop_layers(plain, [1]).save_pretrained(folder / "pruned")
    for name in ("plain", "scaled", "folded", "pruned"):
        for file in (
            "optimizer.pt",
            "training_args.bin",
            "trainer_state.json",
            ".git/config",
            "checkpoint-5/model.safetensors",
        ):
            path = folder / name / file
            path.parent.mkdir(exist_ok=True)
            path.write_text("x")
        (folder / name / "tokenizer.json").write_text("{}")
    return folder


def test_a_dry_run_names_what_would_be_uploaded_and_needs_no_network(saved):
    upload = push(saved / "plain", "me/model", dry_run=True)
    files = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert upload.files == {name: (saved / "plain" / name).stat().st_size for name in files}
    assert upload.url is None
    shown = str(upload)
    assert shown.startswith("me/model: 5 files, ")
    for name, size in upload.files.items():
        assert f"{size:,}  {name}\n" in shown
    assert "optimizer" not in shown
    assert shown.endswith(upload.card)
    assert not (saved / "plain" / "README.md").exists()


def test_the_commit_is_what_the_dry_run_says(saved, monkeypatch):
    """Up to the border of the network: the two calls of the Hub's client."""
    calls = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo, **given: calls.append((repo, given)))
    monkeypatch.setattr(
        HfApi,
        "create_commit",
        lambda self, repo, operations, **given: (
            calls.append((repo, operations, given)) or SimpleNamespace(commit_url="URL")
        ),
    )
    expected = push(saved / "folded", "me/model", private=True, dry_run=True)
    assert calls == []
    done = push(saved / "folded", "me/model", private=True, message="First")
    assert done.url == "URL"
    assert calls[0] == ("me/model", {"private": True, "exist_ok": True})
    repo, operations, given = calls[1]
    assert (repo, given) == ("me/model", {"commit_message": "First"})
    sent = {}
    for operation in operations:
        with operation.as_file() as file:
            sent[operation.path_in_repo] = file.read()
    assert sent.pop("README.md").decode() == expected.card == done.card
    assert {name: len(content) for name, content in sent.items()} == expected.files
    assert sent["model.safetensors"] == (saved / "folded" / "model.safetensors").read_bytes()


def test_a_scaled_checkpoint_is_refused_unless_asked_for(saved):
    with pytest.raises(ValueError, match=r"^folder '.*scaled' has an active scale") as raised:
        push(saved / "scaled", "me/model", dry_run=True)
    assert raised.value.render_hint() == "fold it first with hf-lnscale export, or use allow_scaled=True"
    card = push(saved / "scaled", "me/model", allow_scaled=True, dry_run=True).card
    assert "import hf_lnscale\nfrom transformers" in card
    assert "which is active" in card


def test_what_the_card_says(saved, tmp_path):
    folded = push(saved / "folded", "me/folded", base_model="someone/base", dry_run=True).card
    assert "folded into its norm weights" in folded
    assert "import hf_lnscale" not in folded
    assert "## Measured" not in folded
    front = ModelCard(folded).data
    assert (front.base_model, front.library_name, front.tags) == ("someone/base", "transformers", ["hf-lnscale"])
    pruned = push(saved / "pruned", "me/pruned", dry_run=True).card
    assert "Layers 1 (counted from 0) of the original 4" in pruned
    assert "with 3 layers" in pruned
    exec(pruned.partition("```python\n")[2].partition("```")[0].replace("me/pruned", str(saved / "pruned")), {})


def test_the_measured_table(saved, tmp_path):
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(saved / "pruned").save_pretrained(folder)

    def card(**given):
        return push(folder, "me/model", dry_run=True, **given).card

    (folder / "all_results.json").write_text(json.dumps({"eval_loss": 3.25, "note": "text"}))
    assert "| eval_loss | 3.25 |" in card()
    (tmp_path / "found.json").write_text(json.dumps(EVALUATION))
    given = card(evaluation=tmp_path / "found.json")
    assert EVALUATION["markdown"] in given
    assert "3.25" not in given
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    assert card() == given

    # A README that is there is kept, and the table in it is renewed.
    (folder / "README.md").write_text("---\ntags: [mine]\n---\n\n# Mine\n")
    first = card()
    assert first.startswith("---\ntags: [mine]\n---\n\n# Mine\n\n")
    assert EVALUATION["markdown"] in first
    (folder / "README.md").write_text(first + "\nAfter it.\n")
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION | {"markdown": "| new |"}))
    second = card()
    assert "| new |" in second
    assert "39.75" not in second
    assert second.count("## Measured") == 1
    assert second.endswith("\nAfter it.\n")
    (folder / "evaluation.json").unlink()
    (folder / "README.md").write_text("as prune wrote it")
    assert card() == "as prune wrote it"


@pytest.mark.parametrize(
    ("folder", "given", "error", "message"),
    [
        ("nowhere", {}, FileNotFoundError, "^folder .* does not exist"),
        ("empty", {}, FileNotFoundError, "it has no config.json"),
        ("config", {}, FileNotFoundError, "it has no weights"),
        ("plain", {"repo_id": "a/b/c"}, ValueError, "repo_id: "),
        ("plain", {"evaluation": "none.json"}, FileNotFoundError, "^evaluation .* does not exist"),
        ("plain", {"evaluation": "wrong.json"}, ValueError, "was not written by hf-lnscale evaluate --out"),
    ],
)
def test_refused(folder, given, error, message, saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text((saved / "plain" / "config.json").read_text())
    (tmp_path / "plain").symlink_to(saved / "plain")
    (tmp_path / "wrong.json").write_text("[]")
    with pytest.raises(error, match=message):
        push(tmp_path / folder, **({"repo_id": "me/model", "dry_run": True} | given))
