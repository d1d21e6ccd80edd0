"""The Python in README and docs runs as it stands, on a small model in place of the one that is named."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tiny

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "docs/converting.md",
    "docs/diagnosis.md",
    "docs/evaluation.md",
    "docs/families.md",
    "docs/pruning.md",
    "recipes/README.md",
]
IN_PLACE_OF = {
    "Qwen/Qwen3-0.6B-Base": "qwen3",
    "HuggingFaceTB/SmolLM2-135M": "qwen3",
    "path/of/a/scaled/checkpoint": "scaled",
    "[12, 14]": "[1, 2]",
    "[7, 26]": "[0]",
    "mlp=[9]": "mlp=[3]",
}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.model("qwen3").save_pretrained("qwen3")
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0} | {f"w{i}": i for i in range(3, 96)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", model_input_names=["input_ids"]
    ).save_pretrained("qwen3")
    Path("text.txt").write_text(" ".join(f"w{i}" for i in tiny.tokens(1, 1600)[0].tolist()))
    shutil.copytree("qwen3", "smaller")
    tiny.model("qwen3", ln_scaling=True).save_pretrained("scaled")
    text = (ROOT / page).read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
    assert code
    for name, stand_in in IN_PLACE_OF.items():
        code = code.replace(name, stand_in)
    torch.manual_seed(0)
    from hf_lnscale.core import families

    monkeypatch.setattr(families, "FAMILIES", families.FAMILIES.copy())
    monkeypatch.setattr("hf_lnscale.core.stack.FAMILIES", families.FAMILIES)
    exec(compile(code, page, "exec"), {})


@pytest.mark.slow
def test_the_notebook_runs(run_python):
    """All cells, one after the other, in a process of their own."""
    cells = json.loads((ROOT / "docs/walkthrough.ipynb").read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    printed = run_python(code, plugin=True)
    assert "6 layers;" in printed
    whole, healed = (float(re.search(rf"{name}  perplexity ([\d.]+)", printed)[1]) for name in ("whole", "healed"))
    assert whole < 400  # of 512 tokens: it has learned something
    assert 0.9 * whole < healed < 1.1 * whole


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md"), ROOT / "recipes/README.md"]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_family_is_documented():
    text = (ROOT / "docs/families.md").read_text(encoding="utf-8")
    for family in tiny.FAMILIES:
        assert re.search(rf"\b{family}\b", text), family


def test_families_are_counted_as_they_are_listed():
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in (ROOT / "docs/families.md").read_text(encoding="utf-8").splitlines()
        if re.match(r"\| (scale|drop|neither)", line)
    ]
    listed = dict.fromkeys(("scale; drop", "scale", "drop", "neither"), 0)
    for works, kinds in rows:
        parts = re.sub(r" \(with [^)]*\)", "", works).split(":")[0].split("; ")
        what = "; ".join(part for part in parts if not part.startswith("not "))
        listed[what] += len(set(kinds.split(", ")) - {"mistral4"})  # which transformers does not register
    counted = re.findall(r"^\| ([a-z; ]+) \| (\d+) \|$", (ROOT / "docs/compatibility.md").read_text(), re.MULTILINE)
    assert {what: int(number) for what, number in counted if what in listed} == listed
