"""Uploads a checkpoint to the Hugging Face Hub, with a model card that documents changes and evaluation results."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from .._version import __version__
from ..core.display import Markdown, one_line, show_bytes
from ..core.errors import ArgumentError, PathNotFoundError
from ..core.families import text_config
from ..core.json_file import read_object
from ..core.record import record
from .card import Table, model_card
from .folders import COMPANIONS, EVALUATION_FILE, MEASURED, WEIGHTS, files_of
from .names import locate, read_config

_BEGIN, _END = "<!-- hf-lnscale: measured -->", "<!-- hf-lnscale: end -->"


@dataclass(frozen=True)
class Upload:
    """The result of `push`."""

    repo_id: str
    private: bool | None  # for a new repository; None uses the account's default
    files: dict[str, int]  # paths in the folder and sizes in bytes, excluding the card
    card: str  # the content of README.md
    folder: Path
    url: str | None = None  # of the commit; None if nothing was uploaded

    def __str__(self) -> str:
        sizes = self.files | {"README.md (below)": len(self.card.encode())}
        lines = [f"{size:>15,}  {one_line(name)}" for name, size in sizes.items()]
        title = f"{self.repo_id}: {len(sizes)} files, {show_bytes(sum(sizes.values()))}"
        return "\n".join([title, *lines, "", self.card])


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    evaluation: str | os.PathLike[str] | None = None,
    base_model: str | None = None,
    allow_scaled: bool = False,
    private: bool | None = None,
    message: str | None = None,
    dry_run: bool = False,
) -> Upload:
    """Uploads a checkpoint with its model card in one commit.

    The card is the folder's README.md with the evaluation table, if any, inserted or replaced. Without a README.md, a
    new card is created with that table or with the Trainer's last evaluation. The folder itself is not changed.

    Args:
        folder: folder of a checkpoint.
        repo_id: name of the Hub repository; created if it does not exist.
        evaluation: a JSON file written by `hf-lnscale evaluate --out`; defaults to `evaluation.json` in the folder.
        base_model: Hub name of the model that this one was made from, for the card.
        allow_scaled: whether to allow a checkpoint that needs hf_lnscale to load, because it has an active scale or
            layers without attention or MLP.
        private: whether to make a new repository private.
        message: the commit message.
        dry_run: only return what would be uploaded; needs no network.

    Raises:
        FileNotFoundError: if `folder` is not a checkpoint or `evaluation` does not exist.
        ValueError: if the checkpoint needs hf_lnscale and `allow_scaled` is False, or if `repo_id` or the content of
            `evaluation` is invalid.
        OSError: if the Hub rejects the upload.
    """
    path = Path(folder)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ArgumentError("repo_id", problem=str(error)) from None
    if not path.is_dir():
        raise PathNotFoundError("folder", str(folder), problem="does not exist")
    if not locate(path)[1] and not (path / "config.json").is_file():
        raise PathNotFoundError("folder", str(folder), problem="is not a checkpoint: it has no config.json")
    names = files_of(path, (*COMPANIONS, *WEIGHTS, *MEASURED))
    files = {name: (path / name).stat().st_size for name in names if name != "README.md"}
    if not any(file.endswith((".safetensors", ".bin", ".gguf")) for file in files):
        raise PathNotFoundError("folder", str(folder), problem="is not a checkpoint: it has no weights")
    config = read_config(path)
    if record(config).needs_plugin and not allow_scaled:
        what, first = "an active scale", "fold it first with hf-lnscale export"
        if record(config).sublayers:
            what, first = "layers without attention or MLP", "fill them first with hf-lnscale export --format zeros"
        problem, hint = f"has {what}, so loading it requires hf_lnscale", f"{first}, or use `allow_scaled=True`"
        raise ArgumentError("folder", str(folder), problem=problem, hint=hint)
    card = _card(path, repo_id, config, base_model, _evaluated(path, evaluation))
    upload = Upload(repo_id, private, files, card, path)
    if dry_run:
        return upload
    api = HfApi(library_name="hf_lnscale", library_version=__version__)
    api.create_repo(repo_id, private=private, exist_ok=True)
    operations = [CommitOperationAdd(path_in_repo=file, path_or_fileobj=path / file) for file in files]
    operations.append(CommitOperationAdd(path_in_repo="README.md", path_or_fileobj=upload.card.encode()))
    commit = api.create_commit(repo_id, operations, commit_message=message or "Upload with hf_lnscale")
    return replace(upload, url=str(commit.commit_url))


def _evaluated(path: Path, evaluation: str | os.PathLike[str] | None) -> str:
    """The section of the card with the evaluation table, or ""."""
    file = Path(evaluation) if evaluation else path / EVALUATION_FILE
    if not file.is_file():
        if evaluation:
            raise PathNotFoundError("evaluation", str(file), problem="does not exist")
        return ""
    try:
        found = read_object(file, settings=dict, markdown=str)
        versions = ", ".join(f"{name} {version}" for name, version in found["settings"]["versions"].items())
        table = f"{found['markdown']}\n\nMeasured by `hf-lnscale evaluate`, {versions}."
        return f"{_BEGIN}\n## Measured\n\n{table}\n{_END}"
    except (ValueError, KeyError, AttributeError):
        problem = "was not written by hf-lnscale evaluate --out"
        raise ArgumentError("evaluation", str(file), problem=problem) from None


def _trained(path: Path) -> Table | None:
    """The metrics saved in the folder by a Trainer."""
    for name in ("eval_results.json", "all_results.json"):
        if (path / name).is_file():
            metrics = read_object(path / name).items()
            if rows := [(key, f"{value:,.4g}") for key, value in metrics if isinstance(value, (int, float))]:
                return Table(("metric", "value"), rows, f"As reported by the Trainer ({name}).", heading="Measured")
    return None


def _card(path: Path, repo_id: str, config: Any, base_model: str | None, section: str) -> str:
    readme = path / "README.md"
    if readme.is_file():
        text = readme.read_text(encoding="utf-8")
        if not section:
            return text
        if _BEGIN in text and _END in text:
            return re.sub(re.escape(_BEGIN) + ".*?" + re.escape(_END), lambda _: section, text, flags=re.DOTALL)
        return f"{text.rstrip()}\n\n{section}\n"
    found = record(config)
    notes = [f"A {config.model_type} model with {text_config(config).num_hidden_layers} layers."]
    if found.active or found.folded:
        state = "active" if found.active else "folded into its norm weights, so it loads like any other model"
        notes.append(f"It uses LayerNorm Scaling (arXiv 2502.05795), which is {state}.")
    if found.dropped:
        dropped = str(found.dropped)
        notes.append(
            f"{dropped[0].upper()}{dropped[1:]} (counted from 0) of the original {found.dropped.num_hidden_layers} "
            "were dropped. This preserves classification better than generation (arXiv 2602.01997)."
        )
    if found.needs_plugin:
        notes.append("Install hf_lnscale and import it before loading; without it, loading fails.")
    code = "import hf_lnscale\n" if found.needs_plugin else ""
    code += "from transformers import AutoModelForCausalLM\n\n"
    code += f'model = AutoModelForCausalLM.from_pretrained("{repo_id}")'
    measured = Markdown(section) if section else _trained(path)
    base, parts = found.dropped.base if found.dropped else None, [measured] if measured else []
    title = repo_id.rpartition("/")[2]
    return str(model_card(title, base_model=base_model or base, notes=notes, code=code, parts=parts))
