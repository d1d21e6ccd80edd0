"""`hf-lnscale info`."""

from __future__ import annotations

import json
from types import SimpleNamespace

from ..core.display import one_line, terminal
from .options import AsJson, Checkpoint


def info(checkpoint: Checkpoint, as_json: AsJson = False) -> None:
    """Show a checkpoint's family, layers, scales and cuts.

    Does not read weights.
    """
    from rich.console import Console

    from ..checkpoints.export import read_info
    from ..core.config import LNScalingConfig
    from ..core.record import SUBLAYERS

    about = read_info(checkpoint)
    if as_json:
        print(json.dumps(about, indent=2))
        return
    found = SimpleNamespace(**about)
    state = "no LayerNorm Scaling"
    if scaling := LNScalingConfig.of(found.active or found.folded):
        warmup = f" (warmup step {scaling.step} of {scaling.warmup_steps} to {scaling.exponent:g})"
        where = "active: needs hf_lnscale to run" if found.active else "folded into the weights: runs anywhere"
        state = f"LayerNorm Scaling, exponent {scaling.exponent_now:g}{warmup if scaling.warming_up else ''}, {where}"
    family = found.family if found.family == found.model_type else f"{found.family} in {found.model_type}"
    print(one_line(found.path))
    print(f"  family   {one_line(family)}{'' if found.supported else ' (cannot be scaled)'}")
    print(f"  layers   {found.num_layers or 'not in its configuration'}")
    if found.dropped:
        dropped = "; ".join(
            f"{what}{', '.join(map(str, layers))}"
            for what, kind in (("", "layers"), ("attention of ", "attention"), ("MLP of ", "mlp"))
            if (layers := found.dropped.get(kind))
        )
        base = f" of {one_line(found.dropped['base'])}" if found.dropped["base"] else ""
        print(f"  dropped  {dropped} of the {found.dropped['num_hidden_layers']} layers{base}")
    if found.dropped and any(found.dropped.get(kind) for kind in SUBLAYERS):
        print("  loading  layers without attention or MLP: needs hf_lnscale to run")
    print(f"  scaling  {state}")
    if scaling and found.num_layers:
        scaling = scaling.for_layers(found.num_layers)
        scales = zip(scaling.depths or (), scaling.scales(found.num_layers), strict=True)
        rows = [(str(layer), str(depth), f"{scale:.4f}") for layer, (depth, scale) in enumerate(scales)]
        Console().print(terminal(("layer", "depth", "scale"), rows))
