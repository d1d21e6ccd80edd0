"""A plugin for axolotl: LayerNorm Scaling, its warmup, dropped layers and depth statistics, set in axolotl's YAML.

plugins:
  - hf_lnscale.integrations.axolotl.DepthPlugin
ln_scaling: true         # or a dict, as in {warmup_steps: 1000}
drop_layers: [12, 14]    # drop_attention and drop_mlp likewise
depth_stats_steps: 100
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, NonNegativeInt, model_validator

from ..core.record import record
from ..core.stack import text_stack
from ..training import DepthStatsCallback, LNScalingWarmupCallback

FLAGS = ("drop_attention", "drop_mlp", "drop_layers", "ln_scaling")


class DepthArgs(BaseModel):
    """Keys that the plugin adds to axolotl's YAML.

    Attributes:
        ln_scaling: as for `from_pretrained`, or with `reinit_weights: true` as for `from_config`. A warmup is advanced.
        drop_layers: layers to drop, counted from 0.
        drop_attention, drop_mlp: layers that lose only their attention or MLP; counted like `drop_layers`.
        depth_stats_steps: steps between measurements of `DepthStatsCallback`, which is added only if this is set.
    """

    ln_scaling: bool | dict[str, Any] | None = None
    drop_layers: list[int] | None = None
    drop_attention: list[NonNegativeInt] | None = None
    drop_mlp: list[NonNegativeInt] | None = None
    depth_stats_steps: int | None = None

    @model_validator(mode="after")
    def _one_by_one(self) -> DepthArgs:
        """Refuses layers that lose both, which would be dropped and renumber the others before `drop_layers` is set."""
        if both := set(self.drop_attention or ()) & set(self.drop_mlp or ()):
            raise ValueError(f"drop_attention and drop_mlp: layers {sorted(both)} lose both; name them in drop_layers")
        return self


class DepthPlugin(BasePlugin):  # type: ignore[misc]  # axolotl need not be installed
    """Passes the flags in axolotl's YAML to models, and adds the callbacks that they need to Trainers."""

    def get_input_args(self) -> str:
        return f"{__name__}.{DepthArgs.__name__}"

    def register(self, cfg: Any) -> None:
        # axolotl sets the overrides one by one on the configuration with which each model is built or loaded. Hence the
        # order of FLAGS: layers come after sub-layers, since dropping them renumbers the others, and before the scale,
        # which derives its depths from them. Plain values, since pydantic cannot serialize axolotl's dicts.
        plain = cfg.to_dict()
        flags = {key: plain[key] for key in FLAGS if plain.get(key) is not None}
        overrides = "model_config" if plain.get("model_config") else "overrides_of_model_config"
        if flags:
            cfg[overrides] = (plain.get(overrides) or {}) | flags

    def post_model_build(self, cfg: Any, model: Any) -> None:
        found = record(text_stack(model).model.config)
        built = {key: found.active if key == "ln_scaling" else found.dropped for key in FLAGS}
        if ignored := [key for key in FLAGS if cfg[key] and not built[key]]:
            missing = ", ".join(f"{key}={cfg[key]!r}" for key in ignored)
            raise RuntimeError(
                f"axolotl built a model without {missing} from the YAML. This release handles "
                "overrides_of_model_config differently and is not supported"
            )

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        callbacks: list[Any] = []
        active = record(text_stack(trainer.model).model.config).active
        if active is not None and active.warming_up:
            callbacks.append(LNScalingWarmupCallback())
        if cfg.depth_stats_steps:
            callbacks.append(DepthStatsCallback(trainer, cfg.depth_stats_steps))
        return callbacks
