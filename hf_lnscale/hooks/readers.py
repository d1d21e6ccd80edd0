"""Functions that read weights by the names of tensors, repeat layers, or average models.

The names in a checkpoint number its own layers. In a model without some of them, layer 7 is another one.
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
    """Notes in the metadata that torch keeps in a state, beside its keys, what the model lacks."""
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
    if MARK in local_metadata and (there := record({DROPPED: local_metadata[MARK]}).dropped):
        if stack := own_stack(self):
            _require_own_state(self, len(stack.layers), there)
    elif record(self.config).dropped and (stack := own_stack(self)):
        # Such a state has no configuration; one with more layers than the model is of another.
        layer = re.compile(rf"{re.escape(prefix + stack.family.layers)}\.(\d+)\.")
        found = [int(match[1]) for name in state_dict if (match := layer.match(name))]
        if max(found, default=0) >= len(stack.layers):
            raise _of_another_model(self, f"the state_dict holds a layer {max(found)}")
    return original(self, state_dict, prefix, local_metadata, *args, **kwargs)


def _require_own_state(model: PreTrainedModel, num_layers: int, there: Dropped) -> None:
    """Refuses the state of a model of other layers, or that lacks sub-layers which this one has.

    Raises:
        CheckpointError: if so. A model without a record may be of any layers, if it has as many.
    """
    other = (there.layers, there.num_hidden_layers) if num_layers == len(there.kept) else ((), num_layers)
    here = record(model.config).dropped or Dropped(*other)
    absent = [f"{kind} {layer}" for kind in SUBLAYERS for layer in {*getattr(there, kind)} - {*getattr(here, kind)}]
    if absent or (here.layers, here.num_hidden_layers) != (there.layers, there.num_hidden_layers):
        raise CheckpointError(
            f"the state_dict is that of a model of {there.num_hidden_layers} layers without {there}, but this "
            f"{type(model).__name__} is one of {here.num_hidden_layers} without {str(here) or 'a gap'}. By their "
            "names, weights would go to other layers, or be missing"
        )


def require_checkpoint_of(model: torch.nn.Module, checkpoint: str | os.PathLike[str]) -> None:
    """Refuses a checkpoint whose tensors are about to be put into modules by their names, if its layers are others.

    It is given as a folder, a file, or the index of a sharded checkpoint.
    """
    base = next(iter(pretrained_modules(model)), None)
    path = Path(checkpoint)
    folder, files = (path, []) if path.is_dir() else (path.parent, [path])
    if base is None or not (is_flagged(base.config) or (folder / "config.json").is_file()):
        return
    if path.suffix == ".json" or not files:
        files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if _positions(base, folder, files) is not None:
        raise _of_another_model(base, f"{str(path)!r} holds other layers")
    try:
        saved = saved_config(base.config, folder)
    except (OSError, ValueError):  # no configuration, or none of transformers
        saved = {}
    # What is missing would keep the values that the model was made with.
    checkpoint_layers.require_sublayers(base.config, saved)
    loaded = copy.deepcopy(base.config)
    note_what_is_on_disk(loaded, folder, {})
    warn_if_cold(loaded, folder)


def _positions(model: PreTrainedModel, folder: Path, files: Iterable[Path]) -> list[int] | None:
    """Where the layers of a model are in weight files; None if under their own numbers."""
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
        f"{dropped.num_hidden_layers} of the original. Read by their numbers, weights would go to other layers. "
        f"Load it with from_pretrained(..., drop_layers={list(dropped.layers)})"
    )


def require_all_layers(wanted: Iterable[str], stored: Iterable[str]) -> None:
    """Refuses to read fewer layers than are stored for a cut model. A state dict does not say whose it is; a model of
    that many layers, cut from another, must be in memory."""
    here, there = _highest_numbers(wanted), _highest_numbers(stored)
    fewer = {prefix: number for prefix, number in here.items() if number < there.get(prefix, 0)}
    for model in gc.get_objects() if fewer else ():
        cut = issubclass(type(model), PreTrainedModel) and record(getattr(model, "config", None)).dropped
        if cut and (stack := own_stack(model)):
            for prefix, number in fewer.items():
                if prefix.endswith(stack.family.layers) and number == len(stack.layers) - 1:
                    raise _of_another_model(model, f"the checkpoint holds a layer {there[prefix]}")


def _highest_numbers(names: Iterable[str]) -> dict[str, int]:
    """The highest number that follows each prefix in names such as `model.layers.3.mlp`."""
    found: dict[str, int] = {}
    for name in names:
        for match in re.finditer(r"\.(\d+)\.", name):
            prefix = name[: match.start()]
            found[prefix] = max(int(match[1]), found.get(prefix, 0))
    return found


def require_same_layers(name: str, delta: str, **where: Any) -> None:
    """Refuses a checkpoint of which the tensors are about to be added to those of another, if its layers are others.

    Raises:
        ArgumentError: if layers were dropped, or a scale was folded, in one of them alone or in another way; or if the
            second lacks sub-layers of the first.
    """
    configs = [AutoConfig.from_pretrained(one, **where) for one in (name, delta)]
    first, second = map(record, configs)
    # Models that lack none need not count their layers.
    differ = (first.dropped or second.dropped) and operator.ne(*map(checkpoint_layers.original_layers, configs))
    lacking = [(kind, set(gone) - set(first.sublayers.get(kind, ()))) for kind, gone in second.sublayers.items()]
    if not differ and (names := [f"{kind} of layers {sorted(gone)}" for kind, gone in lacking if gone]):
        raise ArgumentError("delta", delta, problem=f"lacks the {' and the '.join(names)}, which the model has")
    if differ or first.folded != second.folded:
        raise ArgumentError(
            "delta",
            delta,
            problem=f"has {second.to_dict()} and the model {first.to_dict()}: their tensors of one name are not of the "
            "same layer, or not of the same scale. Add the delta to the original model, and cut or fold the sum",
        )


def init_loftq_loader(original: Original, /, self: Any, peft_model: Any, *args: Any, **kwargs: Any) -> None:
    """Makes PEFT's LoftQ read the weights of a layer where the checkpoint has it."""
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
    """PEFT's `layer_replication`: an adapter notes its base, and cannot note the depths of layers that are repeated."""
    for module in pretrained_modules(model):
        found = record(module.config)
        if scaling := found.active or found.folded:
            depths = scaling.for_layers(text_config(module.config).num_hidden_layers).depths or ()
            repeated = [depths[layer] for start, end in layer_map for layer in range(start, end)]
            raise ArgumentError(
                "layer_replication",
                layer_map,
                problem="cannot be used on a model with LayerNorm Scaling, which is a property of its layers, as "
                "the adapter could not be loaded again. Repeat the layers in the model itself, with "
                f'ln_scaling={{"depths": {repeated}}}, save it, and put the adapter on that',
            )
    return original(model, layer_map, *args, **kwargs)


def update_parameters(original: Original, /, self: Any, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """torch's `AveragedModel`: the scale of an average is that of the model, as its buffers are."""
    result = original(self, model, *args, **kwargs)
    for module in pretrained_modules(model):
        if (scaling := record(module.config).active) and scaling.warmup_steps:
            set_ln_scaling_step(self.module, scaling.step)
            break
    return result
