"""The Python in README and docs runs as it stands, on a small model in place of the one that is named."""

import re
from pathlib import Path

import pytest
import torch

import tiny

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "docs/families.md", "recipes/README.md"]


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.model("qwen3").save_pretrained("qwen3")
    tiny.model("qwen3", ln_scaling=True).save_pretrained("scaled")
    text = (ROOT / page).read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
    assert code
    code = code.replace("Qwen/Qwen3-0.6B-Base", "qwen3").replace("path/of/a/scaled/checkpoint", "scaled")
    torch.manual_seed(0)
    from hf_lnscale import families

    monkeypatch.setattr(families, "FAMILIES", families.FAMILIES.copy())
    monkeypatch.setattr("hf_lnscale.scaling.FAMILIES", families.FAMILIES)
    exec(compile(code, page, "exec"), {})


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md"), ROOT / "recipes/README.md"]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_family_is_documented():
    text = (ROOT / "docs/families.md").read_text(encoding="utf-8")
    for family in tiny.FAMILIES:
        assert re.search(rf"\b{family}\b", text), family
