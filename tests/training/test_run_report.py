"""The figures that a run writes, from what its log says."""

import json

import datasets
import pytest

import recipe
from recipe import SMALL

pytestmark = pytest.mark.xdist_group("recipes")


@pytest.mark.slow
def test_tokens_per_second_leave_out_evaluations_and_earlier_sessions(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    recipe.save_model(tmp_path / "model")
    recipe.write_rows(tmp_path / "text.jsonl", recipe.text_rows())
    out = tmp_path / "out"
    words = ["--model_name_or_path", tmp_path / "model", "--dataset_name", tmp_path / "text.jsonl", *SMALL]
    words += ["--depth_stats_steps", 0, "--eval_strategy", "steps", "--eval_steps", 2, "--save_steps", 4]
    tokens, step = 0, -1  # the first session has an evaluation before its first step
    for steps in (4, 8):
        resume = ["--resume_from_checkpoint", "true"] if step > 0 else []
        assert recipe.run("continue_pretrain", *words, "--max_steps", steps, *resume, "--output_dir", out) == 0
        metrics = recipe.metrics(out)
        log = json.loads((out / "trainer_state.json").read_text())["log_history"]
        # The last evaluation is after the training.
        evaluations = [entry["eval_runtime"] for entry in log if "eval_runtime" in entry and entry["step"] > step][:-1]
        assert len(evaluations) == (3 if step < 0 else 2)
        seconds = metrics["wall_seconds"] - sum(evaluations)
        assert metrics["tokens_per_second"] == pytest.approx((metrics["tokens_seen"] - tokens) / seconds)
        assert metrics["tokens_seen"] == steps * 2 * 32
        tokens, step = metrics["tokens_seen"], steps
