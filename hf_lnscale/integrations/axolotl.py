"""A plugin of axolotl: LayerNorm Scaling, its warmup, dropped layers and depth statistics, from axolotl's YAML.

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
        ln_scaling: as for `from_pretrained`; with `reinit_weights: true` as for `from_config`. A warmup is moved.
        drop_layers: layers to leave out, counted from 0.
        drop_attention, drop_mlp: layers that lose their attention, or their MLP, alone; counted like `drop_layers`.
        depth_stats_steps: steps between two measurements of `DepthStatsCallback`; none without it.
    """

    ln_scaling: bool | dict[str, Any] | None = None
    drop_layers: list[int] | None = None
    drop_attention: list[NonNegativeInt] | None = None
    drop_mlp: list[NonNegativeInt] | None = None
    depth_stats_steps: int | None = None

    @model_validator(mode="after")
    def _one_by_one(self) -> DepthArgs:
        """A layer that loses both would be gone before `drop_layers` is set, and the others counted anew."""
        if both := set(self.drop_attention or ()) & set(self.drop_mlp or ()):
            raise ValueError(f"drop_attention and drop_mlp: layers {sorted(both)} lose both; name them in drop_layers")
        return self


class DepthPlugin(BasePlugin):  # type: ignore[misc]  # axolotl need not be installed
    """Gives models the flags of axolotl's YAML, and their Trainers the callbacks that these call for."""

    def get_input_args(self) -> str:
        return f"{__name__}.{DepthArgs.__name__}"

    def register(self, cfg: Any) -> None:
        # axolotl sets what stands there, one after the other, on the configuration that each of its models is built or
        # loaded with. Layers last of what is dropped, as they are counted anew then; and before the scale, which takes
        # its depths from those that are left. Plain values: pydantic cannot write axolotl's dicts.
        plain = cfg.to_dict()
        flags = {key: plain[key] for key in FLAGS if plain.get(key) is not None}
        overrides = "model_config" if plain.get("model_config") else "overrides_of_model_config"
        if flags:
            cfg[overrides] = (plain.get(overrides) or {}) | flags

    def post_model_build(self, cfg: Any, model: Any) -> None:
        found = record(text_stack(model).model.config)
        built = {key: found.active if key == "ln_scaling" else found.dropped for key in FLAGS}
        if ignored := [key for key in FLAGS if cfg[key] and not built[key]]:
            asked = ", ".join(f"{key}={cfg[key]!r}" for key in ignored)
            raise RuntimeError(
                f"axolotl built a model without {asked} of the YAML: this release sets overrides_of_model_config in "
                "another way, and is not supported"
            )

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        callbacks: list[Any] = []
        active = record(text_stack(trainer.model).model.config).active
        if active is not None and active.warming_up:
            callbacks.append(LNScalingWarmupCallback())
        if cfg.depth_stats_steps:
            callbacks.append(DepthStatsCallback(trainer, cfg.depth_stats_steps))
        return callbacks
