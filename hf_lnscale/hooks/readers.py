"""Functions that read weights by tensor name, repeat layers, or average models.

Tensor names use a checkpoint's own layer indices. In a model with dropped layers, index 7 is a different layer.
"""

from __future__ import annotations

import copy
import gc
import inspect
import json
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import load_state_dict

from ..checkpoints.folders import write_atomically
from ..core.apply import set_ln_scaling_step
from ..core.display import brief
from ..core.errors import ArgumentError, CheckpointError
from ..core.families import text_config
from ..core.norm import ScaledNorm
from ..core.record import MARK, SUBLAYERS, Dropped, Record, is_flagged, is_used, mark, record, scaled_alike
from ..core.stack import base_config, own_stack, pretrained_modules
from ..core.warnings import warn
from ..pruning import checkpoint_layers
from .configuration import saved_config
from .install import Original
from .models import note_what_is_on_disk, warn_if_cold
from .saving import marking, require_same_checkpoint

# Stored beside the weights in the state of a training loop.
STATE_FILE = "hf_lnscale.json"

# --- a state dict: the record is in the metadata that torch keeps next to its keys -----------------------------------


def save_to_state_dict(
    original: Original, /, self: PreTrainedModel, destination: Any, prefix: str, *args: Any, **kwargs: Any
) -> None:
    original(self, destination, prefix, *args, **kwargs)
    if (found := record(self.config).to_dict()) and hasattr(destination, "_metadata"):
        destination._metadata[prefix[:-1]][MARK] = found


def load_from_state_dict(
    original: Original, /, self: PreTrainedModel, state_dict: Any, prefix: str, metadata: Any, *args: Any, **kwargs: Any
) -> Any:
    _require_loadable(self, state_dict, prefix, metadata)
    return original(self, state_dict, prefix, metadata, *args, **kwargs)


def set_base_model_state_dict(original: Original, /, model: Any, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
    """Checks the state before PEFT removes layers that the base lacks, which would hide the mismatch."""
    metadata = getattr(state_dict, "_metadata", {})
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, PreTrainedModel):
            _require_loadable(module, state_dict, name and f"{name}.", metadata.get(name, {}))
    return original(model, state_dict, *args, **kwargs)


def _require_loadable(model: PreTrainedModel, state_dict: Any, prefix: str, local_metadata: Any) -> None:
    """Refuses a state with different layers than the model, or without sub-layers that it has.

    A model without a record accepts any layers, if their number matches. A different scale is only warned of: weights
    that were never trained have none of their own.
    """
    saved, own, stack = record(local_metadata.get(MARK)), record(model.config).dropped, own_stack(model)
    if stack is None:
        return
    number = len(stack.layers)
    if dropped := saved.dropped:
        same_number = number == len(dropped.kept)
        own = own or (Dropped(dropped.layers, dropped.num_hidden_layers) if same_number else Dropped((), number))
        absent = [kind for kind in SUBLAYERS if {*getattr(dropped, kind)} - {*getattr(own, kind)}]
        if absent or (own.layers, own.num_hidden_layers) != (dropped.layers, dropped.num_hidden_layers):
            raise CheckpointError(
                f"the state_dict belongs to a model of {dropped.num_hidden_layers} layers without {dropped}, but this "
                f"{type(model).__name__} has {own.num_hidden_layers}, {f'without {own}' if str(own) else 'all present'}"
                ". Matched by name, weights would be loaded into the wrong layers, or be missing"
            )
    elif own:
        # This state dict has no record of layers; if it has more than the model, it belongs to another one.
        last = _highest_indices(state_dict).get(prefix + stack.family.layers, 0)
        if last >= number:
            raise _of_another_model(model, f"the state_dict has a layer {last}")
    if saved != Record() and not _scaled_like(model.config, saved):
        _warn_of_other_scale("the state_dict", mark(saved), model)


# --- files ----------------------------------------------------------------------------------------------------------


def load_checkpoint_in_model(original: Original, /, model: Any, checkpoint: Any, *args: Any, **kwargs: Any) -> Any:
    """accelerate: refuses a checkpoint (a folder, a file, or the index of a sharded one) with different layers."""
    base = next(iter(pretrained_modules(model)), None)
    path = Path(checkpoint)
    folder, files = (path, []) if path.is_dir() else (path.parent, [path])
    if base is not None and (is_flagged(base.config) or (folder / "config.json").is_file()):
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
    return original(model, checkpoint, *args, **kwargs)


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


def create_model(original: Original, /, self: Any, *args: Any, **kwargs: Any) -> Any:
    """lm-eval: refuses a `delta`, whose tensors are added to the model's by name, with different layers or scale."""
    given = inspect.signature(original).bind(self, *args, **kwargs).arguments
    if delta := given.get("delta"):
        where = {key: given[key] for key in ("revision", "trust_remote_code") if key in given}
        configs = [AutoConfig.from_pretrained(name, **where) for name in (given["pretrained"], delta)]
        first, second = map(record, configs)
        # A configuration without dropped layers need not have a number of layers.
        differ = (first.dropped or second.dropped) and operator.ne(*map(checkpoint_layers.original_layers, configs))
        lacking = {kind: {*layers} - {*first.sublayers.get(kind, ())} for kind, layers in second.sublayers.items()}
        names = [f"{kind} of layers {sorted(layers)}" for kind, layers in lacking.items() if layers]
        if names and not differ:
            raise ArgumentError("delta", delta, problem=f"lacks the {' and the '.join(names)}, which the model has")
        if differ or first.folded != second.folded:
            raise ArgumentError(
                "delta",
                delta,
                problem=f"has {second.to_dict()} and the model {first.to_dict()}: tensors of the same name belong to "
                "different layers or scales. Add the delta to the original model, then cut or fold the sum",
            )
    return original(self, *args, **kwargs)


# --- the state of a training loop, saved by accelerate: the record is in a file beside the weights -------------------


def save_state(original: Original, /, self: Any, *args: Any, **kwargs: Any) -> Any:
    def note(models: Sequence[torch.nn.Module], weights: Any, folder: str) -> None:
        if not self.is_main_process:
            return
        path, marks = Path(folder, STATE_FILE), [mark(record(base_config(model))) for model in models]
        if any(json.loads(one) for one in marks):
            write_atomically(path, json.dumps(marks) + "\n")
        else:
            path.unlink(missing_ok=True)  # left by an earlier state

    handle = self.register_save_state_pre_hook(note)
    try:
        return original(self, *args, **kwargs)
    finally:
        handle.remove()


def load_state(original: Original, /, self: Any, *args: Any, **kwargs: Any) -> Any:
    handle = self.register_load_state_pre_hook(_require_noted)
    try:
        return original(self, *args, **kwargs)
    finally:
        handle.remove()


def _require_noted(models: Sequence[torch.nn.Module], folder: str) -> None:
    """Refuses models whose scales or cuts differ from those recorded beside the weights in a folder."""
    path = Path(folder, STATE_FILE)
    if not path.is_file():
        for model in models:
            _warn_if_unmarked(f"the state in {folder!r}", [model])
        return
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(stored, list) or len(stored) != len(models):
            raise ValueError(f"it must hold a string for each of {len(models)} models")
        for model, one in zip(models, stored, strict=True):
            _require_like(model, [one], f"the weights in {folder!r} were")
    except (ValueError, TypeError, RecursionError) as error:
        raise error if isinstance(error, CheckpointError) else CheckpointError(f"{str(path)!r}: {error}") from None


# --- torch.distributed.checkpoint: the record is in the metadata; a state dict does not name its model ---------------


def create_global_plan(original: Original, /, self: Any, all_plans: Any, *args: Any, **kwargs: Any) -> Any:
    """Marks a checkpoint with the scales and cuts of the models that its layers may belong to."""
    plans, metadata = original(self, all_plans, *args, **kwargs)
    if is_used():  # searching memory for models takes a fraction of a second
        marks = sorted({mark(record(model.config)) for model in _models_of(self.state_dict)})
        others = {key: value for key, value in (metadata.planner_data or {}).items() if key != MARK}  # plans are cached
        if any(json.loads(one) for one in marks):
            metadata.planner_data = {**others, MARK: marks}
        elif others != (metadata.planner_data or {}):
            metadata.planner_data = others
    return plans, metadata


def set_up_planner(
    original: Original, /, self: Any, state_dict: Any, metadata: Any = None, *args: Any, **kwargs: Any
) -> None:
    """Refuses a checkpoint if the model in memory matches none of its marks, or, without marks, has fewer layers."""
    original(self, state_dict, metadata, *args, **kwargs)
    # Private: converts a checkpoint to another format, without a model.
    if metadata is None or type(self).__name__ == "_EmptyStateDictLoadPlanner":
        return
    stored = (metadata.planner_data or {}).get(MARK)
    if not stored and not is_used():
        return
    models = _models_of(self.state_dict)
    here, there = _highest_indices(self.state_dict), _highest_indices(metadata.state_dict_metadata)
    for model in models:
        for prefix in here if record(model.config).dropped else ():
            if here[prefix] < there.get(prefix, 0) and _numbers_layers(prefix, here[prefix], model):
                raise _of_another_model(model, f"the checkpoint has a layer {there[prefix]}")
    if models and stored and not any(_like(model, one) for model in models[1:] for one in stored):
        _require_like(models[0], stored, "the checkpoint was")
    elif not stored and metadata.planner_data is not None:  # None if the storage does not keep it
        _warn_if_unmarked("the checkpoint", models)


def _models_of(state: Mapping[str, Any]) -> list[PreTrainedModel]:
    """The decoders in memory whose layers a state dict names; if any hold its very tensors, only those."""
    numbers = _highest_indices(state)
    objects = gc.get_objects() if numbers else []
    kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, PreTrainedModel)}
    found = [
        model
        for model in objects
        if type(model) in kinds and any(_numbers_layers(prefix, number, model) for prefix, number in numbers.items())
    ]
    held = {_address(tensor) for tensor in state.values()} - {0} if len(found) > 1 else set()
    return [model for model in found if held & set(map(_address, model.parameters()))] or found


def _numbers_layers(prefix: str, number: int, model: PreTrainedModel) -> bool:
    """Whether a prefix and the highest index after it are those of a model's layers."""
    stack = own_stack(model) if hasattr(model, "config") else None
    return stack is not None and number == len(stack.layers) - 1 and f".{prefix}".endswith(f".{stack.family.layers}")


def _address(value: Any) -> int:
    """The address of a tensor's values, or of this process's shard; 0 if it has none."""
    local = value.to_local() if hasattr(value, "to_local") else value
    return local.data_ptr() if isinstance(local, torch.Tensor) else 0


def _highest_indices(names: Iterable[str]) -> dict[str, int]:
    """The highest index after each prefix in names such as `model.layers.3.mlp`."""
    found: dict[str, int] = {}
    for name in names:
        for match in re.finditer(r"\.(\d+)\.", name):
            prefix = name[: match.start()]
            found[prefix] = max(int(match[1]), found.get(prefix, 0))
    return found


# --- comparison -----------------------------------------------------------------------------------------------------


def _of_another_model(model: PreTrainedModel, what: str) -> CheckpointError:
    dropped = record(model.config).dropped
    assert dropped is not None
    return CheckpointError(
        f"{what}, but this {type(model).__name__} has {len(dropped.kept)} layers, {dropped.kept} of the "
        f"original {dropped.num_hidden_layers}. Matched by index, weights would be loaded into the wrong layers. "
        f"Load it with from_pretrained(..., drop_layers={list(dropped.layers)})"
    )


def _require_like(model: torch.nn.Module, stored: Iterable[str], what: str) -> None:
    if not any(_like(model, one) for one in stored):
        raise CheckpointError(
            f"{what} saved by a model with {brief(', '.join(stored))}, but this {type(model).__name__} has "
            f"{mark(record(base_config(model)))}. Build the model with the same ln_scaling, drop_layers, "
            "drop_attention and drop_mlp to load it"
        )


def _like(model: torch.nn.Module, stored: str) -> bool:
    """Whether a model matches a mark, ignoring the step of a warmup, which advances."""
    other, config = record(json.loads(stored)), base_config(model)
    return record(config).dropped == other.dropped and _scaled_like(config, other)


def _scaled_like(config: PreTrainedConfig | None, other: Record) -> bool:
    same = record(config).folded == other.folded
    return same and (other.active is None if config is None else scaled_alike(config, other.active))


def _warn_if_unmarked(what: str, models: Sequence[torch.nn.Module]) -> None:
    """Warns if weights without a mark, such as those of plain models, are about to be loaded into scaled models."""

    def is_scaled(model: torch.nn.Module) -> bool:  # at the start of a warmup, the scale has no effect yet
        norms = [part for part in model.modules() if isinstance(part, ScaledNorm)]
        return bool(record(base_config(model)).folded) or any(float(norm.ln_scale) != 1 for norm in norms)

    if models and all(map(is_scaled, models)):
        _warn_of_other_scale(what, "no recorded scale", models[0])


def _warn_of_other_scale(what: str, saved: str, model: torch.nn.Module) -> None:
    warn(
        f"{what} was saved by a model with {saved}, but this {type(model).__name__} has "
        f"{mark(record(base_config(model)))}. If its weights are trained, their layers expect the scale that they were "
        "trained with: build the model with the same ln_scaling"
    )


# --- weights written without a configuration, and without a model in memory ------------------------------------------


def save_model(original: Original, /, self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    """accelerate: marks weights that are saved without the model's configuration."""
    with marking(mark(record(base_config(model)))):
        return original(self, model, *args, **kwargs)


def merge_weights(original: Original, /, checkpoint_dir: Any, *args: Any, **kwargs: Any) -> Any:
    """accelerate's `merge_fsdp_weights`: passes on the mark of a distributed checkpoint, if it is of one model."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader  # missing in some builds of torch

    marks = (FileSystemReader(checkpoint_dir).read_metadata().planner_data or {}).get(MARK) or []
    with marking(marks[0] if len(marks) == 1 else "{}"):
        return original(checkpoint_dir, *args, **kwargs)


def run_merge(original: Original, /, merge_config: Any, out_path: Any, options: Any, *args: Any, **kwargs: Any) -> Any:
    """mergekit: refuses checkpoints of different scales or layers, or slices of one, as one configuration is written.

    TRL's `MergeModelCallback` calls it, too.
    """
    remote = {"trust_remote_code": options.trust_remote_code}
    marks = {str(model): mark(record(model.config(**remote))) for model in merge_config.referenced_models()}
    sliced = merge_config.slices or merge_config.modules
    if len({*marks.values()}) > 1 or (sliced and any(json.loads(one) for one in marks.values())):
        raise ArgumentError(
            "merge_config",
            marks,
            problem="would write the tensors of other layers or scales with the configuration of one of these. Merge "
            "models of the same ln_scaling and dropped layers, whole; to take layers out, use drop_layers",
        )
    return original(merge_config, out_path, options, *args, **kwargs)


# --- repeated layers and averages -----------------------------------------------------------------------------------


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
