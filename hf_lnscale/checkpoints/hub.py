"""A checkpoint on the Hugging Face Hub, with a model card that tells what was done and what was measured."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import filter_repo_objects, validate_repo_id

from .._version import __version__
from ..core.display import markdown, show_bytes
from ..core.families import text_config
from ..core.record import DROPPED, FOLDED, get_ln_scaling
from ..evaluation.comparison import EVALUATION_FILE
from ..pruning.plan import PLAN_FILE, read_plan
from .names import locate, read_config

# Of a training run, not of the model: states, logs, and a pickle with paths of the machine.
LEFT_OUT = [
    ".*", "*/.*", "checkpoint-*/*", "global_step*/*", "runs/*", "wandb/*", "optimizer.*", "scheduler.*", "scaler.*",
    "rng_state*", "training_args.bin", "trainer_state.json", "latest", "zero_to_fp32.py", "*.lock", "*.partial",
    "README.md", "__pycache__/*", "run.json",
]  # fmt: skip
_BEGIN, _END = "<!-- hf-lnscale: measured -->", "<!-- hf-lnscale: end -->"


@dataclass(frozen=True)
class Upload:
    """What `push` uploads.

    Attributes:
        repo_id: where to.
        private: whether a repository that is made new is private; None leaves it to the account's setting.
        files: paths in the folder, and their sizes in bytes; the card is not among them.
        card: the README.md to be.
        folder: where the files are.
        url: of the commit; None if nothing was uploaded.
    """

    repo_id: str
    private: bool | None
    files: dict[str, int]
    card: str
    folder: Path
    url: str | None = None

    def __str__(self) -> str:
        lines = [f"{size:>15,}  {name}" for name, size in self.files.items()]
        lines.append(f"{len(self.card.encode()):>15,}  README.md (below)")
        total = sum(self.files.values()) + len(self.card.encode())
        files = len(self.files) + 1
        return "\n".join([f"{self.repo_id}: {files} files, {show_bytes(total)}", *lines, "", self.card])


def push(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    evaluation: str | os.PathLike | None = None,
    base_model: str | None = None,
    allow_scaled: bool = False,
    private: bool | None = None,
    message: str | None = None,
    dry_run: bool = False,
) -> Upload:
    """Uploads a checkpoint with its model card, in one commit.

    The card is the folder's README.md, with the table of the evaluation in it if there is one (in place of one that was
    put there before); or a new card with that table, or else that of the pruning plan, or of the trainer's last
    evaluation. The folder itself is not changed.

    Args:
        folder: folder of a checkpoint.
        repo_id: name of a repository on the Hub; made if it does not exist.
        evaluation: a JSON file that `hf-lnscale evaluate --out` wrote; else `evaluation.json` in the folder.
        base_model: name on the Hub of the model that this one was made from, for the card.
        allow_scaled: upload a checkpoint with an active scale, which needs hf_lnscale to load.
        private: make a new repository private.
        message: of the commit.
        dry_run: find out what would be uploaded, and do not; needs no network.

    Raises:
        FileNotFoundError: if `folder` holds no checkpoint, or `evaluation` is no file.
        ValueError: if a scale is active, without `allow_scaled`; if `repo_id` cannot be one; if `evaluation` is not
            what `evaluate` writes.
        OSError: if the Hub refuses.
    """
    path = Path(folder)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id: {error}") from None
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {str(folder)!r}")
    if not locate(path)[1] and not (path / "config.json").is_file():
        raise FileNotFoundError(f"{str(folder)!r} is no checkpoint: it has no config.json")
    files = _files(path)
    if not any(file.endswith((".safetensors", ".bin", ".gguf")) for file in files):
        raise FileNotFoundError(f"{str(folder)!r} is no checkpoint: it has no weights")
    config = read_config(path)
    if get_ln_scaling(config) and not allow_scaled:
        raise ValueError(
            f"{str(folder)!r} has an active scale: only who has hf_lnscale can load it. Fold it first (hf-lnscale "
            "export), or use --allow-scaled"
        )
    upload = Upload(
        repo_id, private, files, _card(path, repo_id, config, base_model, _evaluated(path, evaluation)), path
    )
    if dry_run:
        return upload
    api = HfApi(library_name="hf_lnscale", library_version=__version__)
    api.create_repo(repo_id, private=private, exist_ok=True)
    operations = [CommitOperationAdd(path_in_repo=file, path_or_fileobj=path / file) for file in files]
    operations.append(CommitOperationAdd(path_in_repo="README.md", path_or_fileobj=upload.card.encode()))
    commit = api.create_commit(repo_id, operations, commit_message=message or "Upload with hf_lnscale")
    return Upload(**{**vars(upload), "url": str(commit.commit_url)})


def _files(path: Path) -> dict[str, int]:
    names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    return {name: (path / name).stat().st_size for name in filter_repo_objects(names, ignore_patterns=LEFT_OUT)}


def _evaluated(path: Path, evaluation: str | os.PathLike | None) -> str:
    """The table that `evaluate` found, in Markdown, or ""."""
    file = Path(evaluation) if evaluation else path / EVALUATION_FILE
    if not file.is_file():
        if evaluation:
            raise FileNotFoundError(f"evaluation: there is no file {str(file)!r}")
        return ""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        versions = ", ".join(f"{name} {version}" for name, version in found["settings"]["versions"].items())
        return f"{found['markdown']}\n\nMeasured by `hf-lnscale evaluate`, {versions}."
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"evaluation: {str(file)!r} is not what hf-lnscale evaluate --out writes") from None


def _noted(path: Path) -> str:
    """A table of the figures that pruning or training left in the folder, or ""."""
    if (path / PLAN_FILE).is_file():
        plan = read_plan(path)
        if {"before", "after"} <= plan.perplexity.keys() and plan.data.get("held_out"):
            after = plan.perplexity.get("healed", plan.perplexity["after"])
            rows = [["perplexity, held out", f"{plan.perplexity['before']:.2f}", f"{after:.2f}"]]
            held_out = plan.data["held_out"]
            return (
                f"{markdown(['', 'before', 'after'], rows)}\n\nOn {held_out['num_tokens']:,} tokens of "
                f"{held_out['source']}; measured by `hf-lnscale prune`."
            )
    for name in ("eval_results.json", "all_results.json"):
        if (path / name).is_file():
            metrics = json.loads((path / name).read_text(encoding="utf-8"))
            rows = [[key, f"{value:,.4g}"] for key, value in metrics.items() if isinstance(value, (int, float))]
            if rows:
                return f"{markdown(['metric', 'value'], rows)}\n\nAs the trainer reported them ({name})."
    return ""


def _section(table: str) -> str:
    return f"{_BEGIN}\n## Measured\n\n{table}\n{_END}" if table else ""


def _card(path: Path, repo_id: str, config: Any, base_model: str | None, evaluated: str) -> str:
    readme = path / "README.md"
    if readme.is_file():
        text, section = readme.read_text(encoding="utf-8"), _section(evaluated)
        if not section:
            return text
        if _BEGIN in text and _END in text:
            return re.sub(re.escape(_BEGIN) + ".*?" + re.escape(_END), lambda _: section, text, flags=re.DOTALL)
        return f"{text.rstrip()}\n\n{section}\n"
    text_part = vars(text_config(config))
    scaling, folded, dropped = get_ln_scaling(config), text_part.get(FOLDED), text_part.get(DROPPED)
    base_model = base_model or (dropped or {}).get("base")
    if base_model and Path(base_model).exists():
        base_model = None  # a folder of this machine
    front = ModelCardData(base_model=base_model, library_name="transformers", tags=["hf-lnscale"])
    about = [f"A `{config.model_type}` of {text_config(config).num_hidden_layers} layers."]
    if scaling:
        about.append(
            "It was made with LayerNorm Scaling (arXiv 2502.05795), which is active in it: install `hf_lnscale` and "
            "import it before loading. Without it, loading fails."
        )
    elif folded:
        about.append(
            "It was made with LayerNorm Scaling (arXiv 2502.05795), which is folded into its norm weights: it loads "
            "like any other model."
        )
    if dropped:
        layers = ", ".join(map(str, dropped["layers"]))
        about.append(
            f"Layers {layers} of the original's {dropped['num_hidden_layers']}, counted from 0, were dropped. That "
            "keeps classification better than generation (arXiv 2602.01997)."
        )
    code = "import hf_lnscale\n" if scaling else ""
    code += "from transformers import AutoModelForCausalLM\n\n"
    code += f'model = AutoModelForCausalLM.from_pretrained("{repo_id}")'
    parts = [
        f"# {repo_id.rpartition('/')[2]}",
        " ".join(about),
        f"```python\n{code}\n```",
        _section(evaluated or _noted(path)),
        f"Made with hf_lnscale {__version__}, transformers {transformers.__version__}, torch {torch.__version__}.",
    ]
    card = ModelCard(f"---\n{front.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n")
    return str(card)
