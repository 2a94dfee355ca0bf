"""Weights that lie on disk in other pieces than a model has them, such as experts one by one.

Transformers joins the pieces of a whole model when it opens it, and takes them apart when it saves it. Here
both are done by its own rules, for one tensor or one layer at a time.
"""

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, core_model_loading
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from probeprune.model.folder import Stored
from probeprune.model.forwards import replace_method
from probeprune.provenance import dtype_name


@dataclass(frozen=True, eq=False)
class Pieces:
    """The tensors on disk that a parameter is made of."""

    target: str
    """The parameter; of several that one conversion makes, the first."""
    stored: tuple[tuple[str, str, Stored], ...]
    """In the order in which transformers collects them: the pattern by which one was found, and its name."""
    converter: WeightConverter
    """Transformers' rule, without tensors."""
    empty: PreTrainedModel
    """The model without numbers, whose shapes some rules read."""

    @property
    def places(self) -> tuple[tuple[Path, str], ...]:
        """The files, and the names there."""
        return tuple((piece.file, name) for _, name, piece in self.stored)

    def read(self) -> dict[str, torch.Tensor]:
        """What the pieces make, by the full name of a parameter, in the dtype of the files.

        Raises `OSError` for a piece that has another shape than it had.
        """
        converter = copy.deepcopy(self.converter)
        with ExitStack() as files:
            opened: dict[Path, Any] = {}
            for pattern, name, piece in self.stored:
                if piece.file not in opened:
                    opened[piece.file] = files.enter_context(safe_open(piece.file, framework="pt"))
                found = opened[piece.file].get_tensor(name)
                if tuple(found.shape) != piece.shape:
                    raise OSError(f"{name} has shape {tuple(found.shape)}, and had {piece.shape}")
                converter.add_tensor(self.target, name, pattern, found)
            made = converter.convert(self.target, model=self.empty, config=self.empty.config)
        return {name: own[0] if isinstance(own, list) else own for name, own in made.items()}


class JoinedWeights(OffloadedWeightsLoader):
    """Weights on disk as accelerate reads them, and those that are made of pieces.

    Args:
        plain: those that lie in a file as they are.
        pieces: the others, by full name.
        dtypes: what these are cast to.
    """

    def __init__(
        self,
        plain: OffloadedWeightsLoader,
        pieces: Mapping[str, Pieces],
        dtypes: Mapping[str, torch.dtype],
    ) -> None:
        super().__init__(plain.state_dict, plain.save_folder, plain.index, plain.device)
        self.pieces, self._dtypes = pieces, dtypes
        self.all_keys += [name for name in pieces if name not in self.index]

    def __getitem__(self, key: str) -> torch.Tensor:
        if key not in self.pieces:
            plain: torch.Tensor = super().__getitem__(key)
            return plain
        return self.pieces[key].read()[key].to(self.device or "cpu", self._dtypes[key])

    def places(self, key: str) -> tuple[tuple[Path, str], ...]:
        """The files that a weight is read from, and the names there; none for one in memory."""
        if key in self.pieces:
            return self.pieces[key].places
        return places(self, key)


def places(weights: OffloadedWeightsLoader, key: str) -> tuple[tuple[Path, str], ...]:
    """As `JoinedWeights.places`, of weights that accelerate reads."""
    entry: Mapping[str, Any] = weights.index.get(key, {})
    file = entry.get("safetensors_file")
    return ((Path(file), str(entry.get("weight_name", key))),) if file else ()


class LeftOnDisk:
    """What `left_on_disk` found: the parameters that are made of pieces."""

    def __init__(self, empty: PreTrainedModel, stored: Mapping[str, Stored]) -> None:
        self._empty, self._stored = empty, stored
        rules: Collection[Any] = getattr(empty, "_weight_conversions", None) or ()
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._pieces: dict[str, Pieces] = {}

    def note(self, name: str, rule: WeightConverter) -> None:
        """Note the pieces of one parameter."""
        (target, sources), *_ = rule.layer_targets.items()
        found = []
        for source in sorted(sources, key=dot_natural_key):
            _, pattern = rename_source_key(source, self._renamings, [rule])
            assert pattern is not None
            found.append((pattern, source, self._stored[source]))
        plain = copy.deepcopy(rule)
        plain.layer_targets.clear()
        self._pieces[name] = Pieces(target, tuple(found), plain, self._empty)

    def put(self, model: nn.Module) -> None:
        """Let a model that was opened in the context read what is made of pieces."""
        if not self._pieces:
            return
        dtypes = {name: own.dtype for name, own in model.named_parameters()}
        made: dict[int, JoinedWeights] = {}
        for module in model.modules():
            weights = getattr(module.__dict__.get("_hf_hook"), "weights_map", None)
            if isinstance(weights, PrefixedDataset) and isinstance(weights.dataset, OffloadedWeightsLoader):
                plain = weights.dataset
                if id(plain) not in made:
                    made[id(plain)] = JoinedWeights(plain, self._pieces, dtypes)
                weights.dataset = made[id(plain)]


@contextmanager
def left_on_disk(empty: PreTrainedModel, stored: Mapping[str, Stored]) -> Iterator[LeftOnDisk]:
    """Inside the context, transformers leaves on disk what a `device_map` keeps there, all of it.

    By itself it would join the pieces of every layer, one after the other, and write what they make to a
    second copy of the model on disk.

    Args:
        empty: the model without numbers, as transformers opened it.
        stored: all tensors of its files, by name.
    """
    buffers = {name for name, _ in empty.named_buffers()}
    found = LeftOnDisk(empty, stored)
    place_of: Any = core_model_loading.get_device

    def place(device_map: Any, name: str, valid_torch_device: bool = False) -> Any:
        """Weights that stay on disk are joined without numbers."""
        if valid_torch_device and name not in buffers and place_of(device_map, name) == "disk":
            return "meta"
        return place_of(device_map, name, valid_torch_device=valid_torch_device)

    def keep(
        target_name: str, param: Any, loading_info: Any, folder: Any, index: dict[str, Any], applied_ops: Any
    ) -> dict[str, Any]:
        """Note where a weight lies, in place of writing what it becomes."""
        loading_info.missing_keys.discard(target_name)
        if isinstance(applied_ops, WeightConverter):
            found.note(target_name, applied_ops)
            index.pop(target_name, None)  # of the same name, and not as the model has it
        elif target_name not in index:
            ((source,),) = applied_ops.layer_targets.values()
            file, dtype = str(stored[source].file), dtype_name(param.dtype)
            index[target_name] = {"safetensors_file": file, "weight_name": source, "dtype": dtype}
        return index

    module = cast(Any, core_model_loading)
    undo = replace_method(module, "get_device", place)
    undo_too = replace_method(module, "offload_and_maybe_resave_param", keep)
    try:
        yield found
    finally:
        undo_too()
        undo()


def are_joined(empty: nn.Module) -> bool:
    """Whether weights of a model are made of pieces where it is opened: from its files where it was, else
    from what checkpoints of its class may hold."""
    rules = getattr(empty, "_weight_conversions", None)
    if rules is None and isinstance(empty, PreTrainedModel):
        rules = get_model_conversion_mapping(empty)
    return any(isinstance(rule, WeightConverter) for rule in rules or ())


def published(model: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Some weights of a model by the names, and in the pieces, that its checkpoints have.

    Args:
        model: the model, in the class that its checkpoint opens.
        weights: by name; all or none of the parts of a module.
    """
    made = revert_weight_conversion(model, dict(weights))
    return {name: own.contiguous() for name, own in made.items()}
