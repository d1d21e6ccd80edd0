"""A plugin of axolotl: LayerNorm Scaling, its warmup, dropped layers and depth statistics, from axolotl's YAML.

plugins:
  - hf_lnscale.integrations.axolotl.DepthPlugin
ln_scaling: true         # or a dict, as in {warmup_steps: 1000}
drop_layers: [12, 14]
depth_stats_steps: 100
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from ..core.record import record
from ..core.stack import text_stack
from ..training import DepthStatsCallback, LNScalingWarmupCallback


class DepthArgs(BaseModel):
    """Keys that the plugin adds to axolotl's YAML.

    Attributes:
        ln_scaling: as for `from_pretrained`; with `reinit_weights: true` as for `from_config`. A warmup is moved.
        drop_layers: layers to leave out, counted from 0.
        depth_stats_steps: steps between two measurements of `DepthStatsCallback`; none without it.
    """

    ln_scaling: bool | dict[str, Any] | None = None
    drop_layers: list[int] | None = None
    depth_stats_steps: int | None = None


class DepthPlugin(BasePlugin):  # type: ignore[misc]  # axolotl need not be installed
    """Gives models the flags of axolotl's YAML, and their Trainers the callbacks that these call for."""

    def get_input_args(self) -> str:
        return f"{__name__}.{DepthArgs.__name__}"

    def register(self, cfg: Any) -> None:
        # axolotl sets what stands there on the configuration that each of its models is built or loaded with. Layers
        # first: a scale takes its depths from those that are left.
        flags = {key: cfg[key] for key in ("drop_layers", "ln_scaling") if cfg.get(key) is not None}
        overrides = "model_config" if cfg.get("model_config") else "overrides_of_model_config"
        if flags:
            cfg[overrides] = dict(cfg.get(overrides) or {}) | flags

    def post_model_build(self, cfg: Any, model: Any) -> None:
        found = record(text_stack(model).model.config)
        if (cfg.ln_scaling and not found.active) or (cfg.drop_layers and not found.dropped):
            raise RuntimeError(
                f"axolotl built a model without ln_scaling={cfg.ln_scaling!r}, drop_layers={cfg.drop_layers!r} of the "
                "YAML: this release sets overrides_of_model_config in another way, and is not supported"
            )

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        callbacks: list[Any] = []
        active = record(text_stack(trainer.model).model.config).active
        if active is not None and active.warming_up:
            callbacks.append(LNScalingWarmupCallback())
        if cfg.depth_stats_steps:
            callbacks.append(DepthStatsCallback(trainer, cfg.depth_stats_steps))
        return callbacks
