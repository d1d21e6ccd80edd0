"""Functions that read weights by tensor name, repeat layers, or average models.

Tensor names use a checkpoint's own layer indices. In a model with dropped layers, index 7 is a different layer.
"""

from __future__ import annotations

import copy
import gc
import operator
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.modeling_utils import load_state_dict

from ..core.apply import set_ln_scaling_step
from ..core.errors import ArgumentError, CheckpointError
from ..core.families import text_config
from ..core.record import DROPPED, MARK, SUBLAYERS, Dropped, is_flagged, record
from ..core.stack import own_stack, pretrained_modules
from ..pruning import checkpoint_layers
from .configuration import saved_config
from .install import Original
from .models import note_what_is_on_disk, warn_if_cold
from .saving import require_same_checkpoint


def save_to_state_dict(
    original: Original, /, self: PreTrainedModel, destination: Any, prefix: str, *args: Any, **kwargs: Any
) -> None:
    """Stores what the model lacks in the metadata that torch keeps in a state dict, next to its keys."""
    original(self, destination, prefix, *args, **kwargs)
    if (dropped := record(self.config).dropped) and hasattr(destination, "_metadata"):
        destination._metadata[prefix[:-1]][MARK] = dropped.to_dict()


def load_from_state_dict(
    original: Original,
    /,
    self: PreTrainedModel,
    state_dict: Any,
    prefix: str,
    local_metadata: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if MARK in local_metadata and (saved := record({DROPPED: local_metadata[MARK]}).dropped):
        if stack := own_stack(self):
            _require_own_state(self, len(stack.layers), saved)
    elif record(self.config).dropped and (stack := own_stack(self)):
        # This state dict has no record; if it has more layers than the model, it belongs to another one.
        layer = re.compile(rf"{re.escape(prefix + stack.family.layers)}\.(\d+)\.")
        found = [int(match[1]) for name in state_dict if (match := layer.match(name))]
        if max(found, default=0) >= len(stack.layers):
            raise _of_another_model(self, f"the state_dict has a layer {max(found)}")
    return original(self, state_dict, prefix, local_metadata, *args, **kwargs)


def _require_own_state(model: PreTrainedModel, num_layers: int, saved: Dropped) -> None:
    """Refuses a state dict of a model with different layers, or without sub-layers that this model has.

    Raises:
        CheckpointError: if so. A model without a record accepts any layers, if their number matches.
    """
    other = (saved.layers, saved.num_hidden_layers) if num_layers == len(saved.kept) else ((), num_layers)
    own = record(model.config).dropped or Dropped(*other)
    absent = [f"{kind} {layer}" for kind in SUBLAYERS for layer in {*getattr(saved, kind)} - {*getattr(own, kind)}]
    if absent or (own.layers, own.num_hidden_layers) != (saved.layers, saved.num_hidden_layers):
        raise CheckpointError(
            f"the state_dict belongs to a model of {saved.num_hidden_layers} layers without {saved}, but this "
            f"{type(model).__name__} has {own.num_hidden_layers}, {f'without {own}' if str(own) else 'all present'}. "
            "Matched by name, weights would be loaded into the wrong layers, or be missing"
        )


def require_checkpoint_of(model: torch.nn.Module, checkpoint: str | os.PathLike[str]) -> None:
    """Refuses a checkpoint with different layers whose tensors are about to be loaded into modules by name.

    The checkpoint is a folder, a file, or the index of a sharded checkpoint.
    """
    base = next(iter(pretrained_modules(model)), None)
    path = Path(checkpoint)
    folder, files = (path, []) if path.is_dir() else (path.parent, [path])
    if base is None or not (is_flagged(base.config) or (folder / "config.json").is_file()):
        return
    if path.suffix == ".json" or not files:
        files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if _positions(base, folder, files) is not None:
        raise _of_another_model(base, f"{str(path)!r} has different layers")
    try:
        saved = saved_config(base.config, folder)
    except (OSError, ValueError):  # no configuration, or not one of transformers
        saved = {}
    # Missing sub-layers would keep the values that the model was initialized with.
    checkpoint_layers.require_sublayers(base.config, saved)
    loaded = copy.deepcopy(base.config)
    note_what_is_on_disk(loaded, folder, {})
    warn_if_cold(loaded, folder)


def _positions(model: PreTrainedModel, folder: Path, files: Iterable[Path]) -> list[int] | None:
    """Positions of a model's layers in weight files; None if they match their own indices."""
    if record(model.config).dropped is None:
        return None
    if (folder / "config.json").is_file():
        saved = saved_config(model.config, folder)
        require_same_checkpoint(map(str, files), lambda: saved)
        return checkpoint_layers.positions_on_disk(model.config, saved)
    names = [name for file in files for name in load_state_dict(str(file), map_location="meta")]
    return checkpoint_layers.positions_in_state_dict(model.config, model, names)


def _of_another_model(model: PreTrainedModel, what: str) -> CheckpointError:
    dropped = record(model.config).dropped
    assert dropped is not None
    return CheckpointError(
        f"{what}, but this {type(model).__name__} has {len(dropped.kept)} layers, {dropped.kept} of the "
        f"original {dropped.num_hidden_layers}. Matched by index, weights would be loaded into the wrong layers. "
        f"Load it with from_pretrained(..., drop_layers={list(dropped.layers)})"
    )


def require_all_layers(wanted: Iterable[str], stored: Iterable[str]) -> None:
    """Refuses to load only some of the stored layers if any cut model in memory has that number of layers."""
    requested, available = _highest_indices(wanted), _highest_indices(stored)
    fewer = {prefix: index for prefix, index in requested.items() if index < available.get(prefix, 0)}
    for model in gc.get_objects() if fewer else ():
        cut = issubclass(type(model), PreTrainedModel) and record(getattr(model, "config", None)).dropped
        if cut and (stack := own_stack(model)):
            for prefix, index in fewer.items():
                if prefix.endswith(stack.family.layers) and index == len(stack.layers) - 1:
                    raise _of_another_model(model, f"the checkpoint has a layer {available[prefix]}")


def _highest_indices(names: Iterable[str]) -> dict[str, int]:
    """The highest index after each prefix in names such as `model.layers.3.mlp`."""
    found: dict[str, int] = {}
    for name in names:
        for match in re.finditer(r"\.(\d+)\.", name):
            prefix = name[: match.start()]
            found[prefix] = max(int(match[1]), found.get(prefix, 0))
    return found


def require_same_layers(name: str, delta: str, **where: Any) -> None:
    """Refuses a delta checkpoint with different layers, whose tensors are about to be added to a model by name.

    Raises:
        ArgumentError: if dropped layers or a folded scale differ between the two, or the delta lacks sub-layers that
            the model has.
    """
    configs = [AutoConfig.from_pretrained(one, **where) for one in (name, delta)]
    first, second = map(record, configs)
    # A configuration without dropped layers need not have a number of layers.
    differ = (first.dropped or second.dropped) and operator.ne(*map(checkpoint_layers.original_layers, configs))
    lacking = [(kind, set(layers) - set(first.sublayers.get(kind, ()))) for kind, layers in second.sublayers.items()]
    if not differ and (names := [f"{kind} of layers {sorted(layers)}" for kind, layers in lacking if layers]):
        raise ArgumentError("delta", delta, problem=f"lacks the {' and the '.join(names)}, which the model has")
    if differ or first.folded != second.folded:
        raise ArgumentError(
            "delta",
            delta,
            problem=f"has {second.to_dict()} and the model {first.to_dict()}: tensors of the same name belong to "
            "different layers or scales. Add the delta to the original model, then cut or fold the sum",
        )


def init_loftq_loader(original: Original, /, self: Any, peft_model: Any, *args: Any, **kwargs: Any) -> None:
    """Makes PEFT's LoftQ read a layer's weights from its position in the checkpoint."""
    original(self, peft_model, *args, **kwargs)
    model = peft_model.get_base_model()
    if not record(getattr(model, "config", None)).dropped:
        return
    files = sorted(set((self.weight_map or {}).values())) or [self.model_path]
    positions = _positions(model, Path(self.model_path).parent, map(Path, files))
    if positions is not None:
        get_tensor, known = self.get_tensor, list(model.state_dict())
        on_disk = {number: layer for layer, number in enumerate(positions)}
        inverse = [on_disk.get(number, -1) for number in range(max(positions) + 1)]
        self.get_tensor = lambda name: get_tensor(checkpoint_layers.renumber([*known, name], model, inverse)[name])


def replicate_layers(original: Original, /, model: Any, layer_map: Any, *args: Any, **kwargs: Any) -> Any:
    """PEFT's `layer_replication`, refused because an adapter cannot record the depths of repeated layers."""
    for module in pretrained_modules(model):
        found = record(module.config)
        if scaling := found.active or found.folded:
            depths = scaling.for_layers(text_config(module.config).num_hidden_layers).depths or ()
            repeated = [depths[layer] for start, end in layer_map for layer in range(start, end)]
            raise ArgumentError(
                "layer_replication",
                layer_map,
                problem="cannot be used on a model with LayerNorm Scaling, since the adapter could not be loaded "
                "again. Repeat the layers in the model itself, with "
                f'ln_scaling={{"depths": {repeated}}}, save it, and attach the adapter to that',
            )
    return original(model, layer_map, *args, **kwargs)


def update_parameters(original: Original, /, self: Any, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """`AveragedModel` of torch: copies the warmup step from the model, as it does with buffers."""
    result = original(self, model, *args, **kwargs)
    for module in pretrained_modules(model):
        if (scaling := record(module.config).active) and scaling.warmup_steps:
            set_ln_scaling_step(self.module, scaling.step)
            break
    return result
