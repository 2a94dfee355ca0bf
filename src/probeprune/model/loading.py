"""Open a causal LM and its tokenizer: the embedded one, a local directory, a GGUF file or a hub id.

Whatever it comes from, it ends as a folder with safetensors, which is checked from its configs and from the
headers of its weights before anything is built. Refuses weights that cannot be pruned in place (quantised) or
opened safely (pickled), and those that do not fit their config. Knows nothing of pruning but its records.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from probeprune.errors import UsageError, refusing, unknown
from probeprune.foreign.quiet import quiet_libraries
from probeprune.model.blocks import find_blocks
from probeprune.model.config_checks import FIELDS, GENERATION_FIELDS, check_fields, check_heads
from probeprune.model.families import is_supported
from probeprune.model.folder import (
    CONFIG,
    Stored,
    check_files,
    read_object,
    stored_sizes,
    stored_tensors,
    weight_files,
)
from probeprune.model.gguf_files import converted, embedded_gguf
from probeprune.model.hub import snapshot
from probeprune.model.joined import left_on_disk
from probeprune.model.layer_records import attribute
from probeprune.model.machine import choose_device, choose_dtype
from probeprune.model.making_records import cut_record, read_pruning, read_training, refuse_attached
from probeprune.model.modeling_pruned import distinct_layers
from probeprune.model.multimodal import multimodal_of, text_config
from probeprune.model.nemotron_nas import MODEL_TYPE as NEMOTRON_NAS
from probeprune.model.nemotron_nas import from_nemotron
from probeprune.model.offloading import device_of, room_of, set_scratch
from probeprune.model.placing import Work, place
from probeprune.model.pruned_configs import read_config
from probeprune.model.scratch import Scratch
from probeprune.model.tokenizer_files import open_tokenizer

EMBEDDED_MODEL = "smollm2-135m"
"""SmolLM2-135M-Instruct (Apache-2.0): LLaMA architecture, grouped-query attention, 30 layers."""

_OTHER_MODELS = "a model directory, a .gguf file, a hub id (owner/name)"

_GENERATION = "generation_config.json"

_MOST_LAYERS = 10_000


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode, without gradients for its parameters, and its tokenizer."""

    name: str
    """The name it was opened by."""
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    device: torch.device
    stored_dtype: torch.dtype
    """Dtype of the weights on disk."""
    pruning: dict[str, Any] | None = None
    """The content of pruning.json beside the weights, if `prune` made them."""
    training: dict[str, Any] | None = None
    """The content of training.json beside the weights, if they were trained here."""
    handle: Any = None
    """The handle (`probeprune.Handle`) of the method that is attached, where the folder keeps one."""

    @property
    def cut(self) -> dict[str, Any] | None:
        """The record of the pruning that the weights went through; see `cut_record`."""
        return cut_record(self.pruning, self.training)


def load_model(
    name: str = EMBEDDED_MODEL,
    *,
    dtype: str = "auto",
    device: str = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    memory: int | None = None,
    device_map: str | Mapping[str, int | str] | None = None,
    work: Work | None = None,
    attached: bool = False,
) -> LoadedModel:
    """Open a causal language model and its tokenizer.

    A model that does not fit into memory is opened with its decoder layers on disk: everything that works a
    layer at a time (`prepare`, `prune`, `save`, perplexity and scores, under a method too) works as usual.

    Args:
        name: `smollm2-135m` (embedded), a local directory, a `.gguf` file, or a hub id, tried in this order.
            GGUF weights are converted to float32 safetensors once and kept in `cache_dir()`.
        dtype: `bfloat16`, `float16`, `float32`, or `auto` for the device's `fastest_dtype`.
        device: `auto` (CUDA if available, otherwise CPU) or a name for `torch.device`.
        attn_implementation: as in transformers; None for its default (sdpa if the family supports it).
        trust_remote_code: run code that comes with the model. Only for sources you trust.
        memory: bytes that this process, or its part of an accelerator, may take in all; None for most that is
            free.
        device_map: spreads the layers over several devices, as in transformers: `auto`, `balanced`,
            `sequential`, or a device (`cpu` and `disk` too) for each module by name. In place of `device`
            and `memory`.
        work: what the model is opened for, which takes memory beside its weights (`footprint.Phase`); None
            for measuring perplexity on batches of 16 windows of 512 tokens.
        attached: open the dense weights of a folder that keeps a method attached too; refused otherwise.

    Raises:
        UsageError: no such model, a file in it that is damaged or leads out of its folder, no safetensors
            weights, quantised weights, tensors that are not those of the config, a model that is no causal
            language model, an unknown dtype, a device that this machine does not have, or less memory than
            a layer at a time takes.
    """
    if device_map is not None and (device != "auto" or memory is not None):
        raise UsageError("device_map says where the layers go; leave device and memory out.")
    target = choose_device(device)
    chosen = choose_dtype(dtype, target)
    folder, shape, options = _open(name, trust_remote_code, attached)
    placing = None
    if device_map is None:
        placing = place(name, shape.model, chosen, target, memory, work, stored_sizes(folder))
    where: dict[str, Any] = {}
    if placing is not None or device_map is not None:
        scratch = Scratch("probeprune-layers")
        where = {
            "device_map": device_map if placing is None else placing.places,
            "offload_folder": scratch.path,
        }
    stored = stored_tensors(weight_files(folder))
    reading = left_on_disk(shape.model, stored)
    with quiet_libraries(bars=False), refusing(f"model '{name}' could not be loaded"), reading as left:
        model = auto_class(options["config"]).from_pretrained(
            folder, dtype=chosen, attn_implementation=attn_implementation, **where, **options
        )
    if where:
        left.put(model)
        set_scratch(model, scratch, room_of(model) if placing is None else placing.room)
        target = device_of(model)
    else:
        model.to(target)
    model.requires_grad_(False).eval()
    on_disk = getattr(options["config"], "dtype", None)
    return replace(
        shape,
        model=model,
        dtype=chosen,
        device=target,
        stored_dtype=on_disk if isinstance(on_disk, torch.dtype) else chosen,
    )


def open_shape(name: str, *, trust_remote_code: bool = False) -> LoadedModel:
    """As `load_model`, with a model of all modules and no numbers (device `meta`), in the dtype on disk.

    Raises as `load_model`, but for errors that only the numbers show.
    """
    _, shape, _ = _open(name, trust_remote_code)
    return shape


def _open(
    name: str, trust_remote_code: bool, attached: bool = False
) -> tuple[Path, LoadedModel, dict[str, Any]]:
    """The folder of a model, checked; the model without numbers; what opens the one with numbers."""
    with refusing(f"model {name[:200]!r} could not be found"):
        folder = _locate(name, trust_remote_code, attached)
    check_files(folder)
    pruning, training = read_pruning(folder), read_training(folder)
    config = load_config(name, folder, trust_remote_code)
    tensors = stored_tensors(weight_files(folder))
    options = {"config": config, "use_safetensors": True, "trust_remote_code": trust_remote_code}
    with quiet_libraries(bars=False):
        empty = _check_weights(name, folder, tensors, options)
        tokenizer = open_tokenizer(folder, config, trust_remote_code)
    shape = LoadedModel(
        name=name,
        model=empty.eval(),
        tokenizer=tokenizer,
        dtype=empty.dtype,
        device=torch.device("meta"),
        stored_dtype=empty.dtype,
        pruning=pruning,
        training=training,
    )
    return folder, shape, options


def is_local(name: str) -> bool:
    """Whether a name is the embedded model's, or that of a file or folder here, and not a hub id."""
    return name == EMBEDDED_MODEL or Path(name).expanduser().exists()


def _locate(name: str, code: bool, attached: bool) -> Path:
    """A directory with config.json; a model of another kind is converted or downloaded first."""
    if name == EMBEDDED_MODEL:
        return converted(embedded_gguf())
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UsageError(f"there is no GGUF file '{name}'; check the path.")
        return converted(path)
    if is_folder(name, attached):
        return path
    unknown_locally(name)
    with quiet_libraries():
        return snapshot(name, code=code, attached=attached)


def is_folder(name: str, attached: bool = False) -> bool:
    """Whether a name is that of a directory here. Raises `UsageError` for one that holds no model, or one
    with a method attached unless that is `attached` for."""
    path = Path(name).expanduser()
    if not path.is_dir():
        return False
    if not attached:
        refuse_attached(path)
    # Also beside a config.json: transformers would put the adapter on top of the model.
    if (path / "adapter_config.json").exists():
        raise UsageError(
            f"'{name}' is an adapter, not a model; give the model it was trained on, or train again with "
            "the adapter merged into the model."
        )
    if not (path / CONFIG).exists():
        raise UsageError(
            f"directory '{name}' holds no model, there is no config.json in it; give another one."
        )
    return True


def unknown_locally(name: str) -> None:
    """Raise `UsageError` for a name that is not the hub's to know: another kind of file, a typing error."""
    if Path(name).expanduser().exists():
        raise UsageError(
            f"'{name}' is a file but no .gguf; give a model directory, a .gguf file or a hub id."
        )
    if "/" not in name and difflib.get_close_matches(name.lower(), [EMBEDDED_MODEL]):
        # Without a network, asking the hub would take half a minute.
        raise UsageError(unknown("model", name, [EMBEDDED_MODEL], _OTHER_MODELS))


# -- configs ---------------------------------------------------------------------------------------


def load_config(name: str, folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    """The config, each field of a supported family in its range; checks the generation config too."""
    file, generation = folder / CONFIG, folder / _GENERATION
    fields = read_object(file)
    supported = _is_supported(fields.get("model_type"))
    if supported:
        check_fields(file, fields, FIELDS)
    if generation.exists():
        check_fields(generation, read_object(generation), GENERATION_FIELDS)
        with refusing(f"'{generation}' could not be read"), quiet_libraries():
            GenerationConfig.from_pretrained(folder)
    layers = fields.get("num_hidden_layers")
    if supported and "per_layer_config" in fields and isinstance(layers, int) and layers > _MOST_LAYERS:
        # Transformers would go through them one by one.
        raise UsageError(
            f"'{file}' says num_hidden_layers {layers}, more than any model has; get the checkpoint again."
        )
    with refusing(f"'{file}' could not be read"), quiet_libraries():
        if fields.get("model_type") == NEMOTRON_NAS:
            config = from_nemotron(file, fields)
        else:
            config = read_config(folder, fields, trust_remote_code=trust_remote_code)
    if supported and multimodal_of(config.model_type) is not None:
        check_heads(file, config.text_config, fields.get("text_config") or {})
    elif supported:
        check_heads(file, config, fields)
    if getattr(config, "quantization_config", None) is not None:
        raise UsageError(
            f"model '{name}' is quantised, so its units cannot be reordered in place; give the checkpoint in "
            "full precision."
        )
    return config


def _is_supported(model_type: object) -> bool:
    return model_type == NEMOTRON_NAS or is_supported(model_type)


_OLD_MASKS = tuple(
    f".attn.{name}"
    for name in ("bias", "masked_bias", "attention.bias", "attention.masked_bias", "causal_mask")
)
"""Ends of the names of causal masks that older releases of GPT-2 and its kin stored with the weights. Today's
code makes them itself."""


def auto_class(config: Any) -> Any:
    """The auto class of transformers that opens the model of a config, with its head."""
    return AutoModelForCausalLM if multimodal_of(config.model_type) is None else AutoModelForImageTextToText


# -- weights ---------------------------------------------------------------------------------------


def _check_weights(
    name: str, folder: Path, tensors: Mapping[str, Stored], options: dict[str, Any]
) -> PreTrainedModel:
    """The model without numbers. Raises `UsageError` unless the stored tensors are exactly those that the
    config asks for.

    The model is opened once without memory (device `meta`), so that transformers itself says which names it
    changes, ties or ignores.
    """
    file = folder / CONFIG
    _check_sizes(file, options["config"], tensors)
    with refusing(f"no model can be made from '{file}'"):
        model, loading = auto_class(options["config"]).from_pretrained(
            folder, device_map="meta", ignore_mismatched_sizes=True, output_loading_info=True, **options
        )
    wanted = model.state_dict()
    left_over = sorted(key for key in loading["unexpected_keys"] if not key.endswith(_OLD_MASKS))
    for key in sorted({*wanted, *left_over}):
        stored = _stored_under(key, tensors)
        if (
            stored is not None
            and not stored.is_float
            and (key not in wanted or wanted[key].is_floating_point())
        ):
            raise UsageError(
                f"'{stored.file}' holds '{key}' as {stored.dtype}, which are no floating-point numbers of "
                "full precision; give the checkpoint in float32, float16 or bfloat16."
            )
    for key, found, asked in sorted(loading["mismatched_keys"]):
        raise UsageError(
            f"the weights of model '{name}' hold '{key}' in shape {tuple(found)}, and '{file}' asks for "
            f"{tuple(asked)}; get the checkpoint again."
        )
    missing = sorted(loading["missing_keys"])
    if left_over:
        raise UsageError(
            f"the weights of model '{name}' hold more than '{file}' asks for: {len(left_over)} tensors are "
            f"left over, such as '{left_over[0]}'; get the checkpoint again."
        )
    if missing:
        raise UsageError(
            f"the weights of model '{name}' are incomplete: {len(missing)} tensors are missing, such as "
            f"'{missing[0]}'; get the checkpoint again."
        )
    if hasattr(type(model.config), "prefix"):
        _check_counts(file, model)
    empty: PreTrainedModel = model
    return empty


def _check_sizes(file: Path, config: Any, tensors: Mapping[str, Stored]) -> None:
    """Raise `UsageError` for sizes that the stored tensors rule out; they would take all memory."""
    width = max((size for t in tensors.values() for size in t.shape), default=0)
    config = text_config(config)
    limits = {"num_hidden_layers": len(tensors), "hidden_size": width, "head_dim": width, "vocab_size": width}
    for field, limit in limits.items():
        said = (getattr(own, field, None) for own in distinct_layers(config))
        value = max((v for v in said if isinstance(v, int)), default=0)
        if value > limit:
            raise UsageError(
                f"'{file}' says {field} {value}, and the weights hold {len(tensors)} tensors of at most "
                f"{width} rows or columns; get the checkpoint again."
            )


def _check_counts(file: Path, model: PreTrainedModel) -> None:
    """Raise `UsageError` where a layer has other numbers of heads in the config than in its weights."""
    for block in find_blocks(model):
        if block.kind != "attention":
            continue
        counts: dict[str, float] = {
            **block.counts(block.query_heads, block.kv_heads),
            "num_key_value_groups": block.query_heads / block.kv_heads,
        }
        for name, count in counts.items():
            said = attribute(model.get_submodule(block.name), name)
            if said is not None and said != count:
                raise UsageError(
                    f"'{file}' says {name} {said} of {block.name}, and its weights say {count:g}; get the "
                    "checkpoint again."
                )


def _stored_under(key: str, tensors: Mapping[str, Stored]) -> Stored | None:
    """The tensor that is opened under a name; checkpoints may leave its first parts out, or add some."""
    if key in tensors:
        return tensors[key]
    near = [t for n, t in tensors.items() if n.endswith(f".{key}") or key.endswith(f".{n}")]
    return near[0] if near else None
