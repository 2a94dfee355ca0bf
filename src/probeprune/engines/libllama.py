"""llama.cpp's C interface as one release has it, and the look at a library whether it is that release's.

Knows nothing of the package, which `llama_child.py` must not import.
"""

import ctypes
import os
import re
from ctypes import (
    POINTER,
    byref,
    c_bool,
    c_char_p,
    c_float,
    c_int,
    c_int8,
    c_int32,
    c_size_t,
    c_uint32,
    c_void_p,
)
from pathlib import Path
from typing import Any

VERSION = "0.4.0"
"""The release of llama.cpp whose parameters `ModelParams`, `ContextParams` and `Batch` are."""
REFUSED = 3
"""Exit code where the library is not of that release; standard error is the sentence that says so."""

_ERROR, _CONTINUED = 4, 5  # ggml_log_level
# Room for fields that another build may add at the end: they go back to the library as it filled them.
_BEYOND = ("beyond", c_int8 * 256)


class OtherLibrary(Exception):
    """The library is none of release `VERSION`."""


def _of(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class ModelParams(ctypes.Structure):
    """How a file is opened."""

    _fields_ = (
        *_of(c_void_p, "devices tensor_buft_overrides"),
        *_of(c_int32, "n_gpu_layers split_mode load_mode lazy_mode main_gpu"),
        *_of(c_void_p, "tensor_split progress_callback progress_callback_user_data kv_overrides"),
        *_of(c_bool, "vocab_only check_tensors use_extra_bufts no_host no_alloc load_mtp"),
        _BEYOND,
    )


class ContextParams(ctypes.Structure):
    """How a model is run."""

    _fields_ = (
        *_of(c_uint32, "n_ctx n_batch n_ubatch n_seq_max n_rs_seq n_outputs_max n_outputs_max_per_seq"),
        *_of(c_int32, "n_threads n_threads_batch"),
        *_of(c_int32, "ctx_type rope_scaling_type pooling_type attention_type flash_attn_type"),
        *_of(c_float, "rope_freq_base rope_freq_scale"),
        *_of(c_float, "yarn_ext_factor yarn_attn_factor yarn_beta_fast yarn_beta_slow"),
        *_of(c_uint32, "yarn_orig_ctx"),
        *_of(c_float, "defrag_thold"),
        *_of(c_void_p, "cb_eval cb_eval_user_data"),
        *_of(c_int32, "type_k type_v"),
        *_of(c_void_p, "abort_callback abort_callback_data"),
        *_of(c_bool, "embeddings offload_kqv no_perf op_offload swa_full kv_unified"),
        *_of(c_void_p, "samplers"),
        *_of(c_size_t, "n_samplers"),
        *_of(c_void_p, "ctx_other"),
        _BEYOND,
    )


class Batch(ctypes.Structure):
    """Token ids to compute."""

    _fields_ = (
        *_of(c_int32, "n_tokens"),
        *_of(c_void_p, "token embd pos n_seq_id seq_id logits"),
        _BEYOND,
    )


MODEL_DEFAULTS = {
    "n_gpu_layers": -1,
    "split_mode": 1,
    "load_mode": -1,
    "lazy_mode": 1,
    "use_extra_bufts": 1,
}
CONTEXT_DEFAULTS = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "n_outputs_max_per_seq": 1,
    "n_threads": 4,
    "n_threads_batch": 4,
    "rope_scaling_type": -1,
    "pooling_type": -1,
    "attention_type": -1,
    "flash_attn_type": -1,
    "yarn_ext_factor": -1,
    "yarn_attn_factor": -1,
    "yarn_beta_fast": -1,
    "yarn_beta_slow": -1,
    "defrag_thold": -1,
    "type_k": 1,
    "type_v": 1,
    "offload_kqv": 1,
    "no_perf": 1,
    "op_offload": 1,
    "swa_full": 1,
}
"""What the release fills into its parameters; every field that is not here is zero."""

_LOG = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {  # the result and the arguments
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_batch_get_one": (Batch, [c_void_p, c_int32]),
    "llama_log_set": (None, [_LOG, c_void_p]),
    "llama_backend_init": (None, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, ModelParams]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_init_from_model": (c_void_p, [c_void_p, ContextParams]),
    "llama_attach_threadpool": (None, [c_void_p, c_void_p, c_void_p]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_synchronize": (None, [c_void_p]),
    "llama_get_logits": (POINTER(c_float), [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_vocab_is_eog": (c_bool, [c_void_p, c_int32]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, c_void_p, c_int32, c_bool, c_bool]),
}

_GGML: dict[str, tuple[Any, list[Any]]] = {  # in libraries beside it
    "ggml_backend_load_all_from_path": (None, [c_char_p]),
    "ggml_backend_reg_by_name": (c_void_p, [c_char_p]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_threadpool_params_init": (None, [c_void_p, c_int]),
}


def library_file(folder: Path, name: str) -> Path | None:
    """The shared library `llama`, `ggml` or `ggml-base` in a folder, whatever its platform calls it."""
    pattern = re.compile(rf"(lib)?{name}(\.v?\d[\d.]*)?\.(so|dylib|dll)(\.[\d.]+)?")
    found = sorted(file for file in folder.glob(f"*{name}*") if pattern.fullmatch(file.name))
    return found[0] if found else None


def open_library(file: Path) -> Any:
    """The library with its functions typed, and its code for this processor loaded.

    Raises:
        OtherLibrary: no library, or one of another release; no function that takes a parameter was called.
    """
    try:
        library = ctypes.CDLL(str(file))
        beside = [library_file(file.parent, name) for name in ("ggml", "ggml-base")]
        libraries = [library, *(ctypes.CDLL(str(other)) for other in beside if other)]
        for name, (result, arguments) in _GGML.items():
            # Windows looks for a name in one library alone, other systems in those that it needs too.
            function = getattr(next((one for one in libraries if hasattr(one, name)), library), name)
            function.restype, function.argtypes = result, arguments
            setattr(library, name, function)
    except (OSError, AttributeError) as error:
        raise _other(file, f"cannot be loaded ({' '.join(str(error).split())})") from None
    check(library, file)
    library.llama_log_set(_log_errors, None)
    library.ggml_backend_load_all_from_path(os.fsencode(file.parent))
    library.llama_backend_init()
    return library


def thread_pool(library: Any, threads: int) -> int | None:
    """Threads that wait for work, as llama.cpp's own programs keep them; None where the library has no such.

    Without them the engine starts threads for every token, and decodes several times slower while other
    processes want the same cores.
    """
    cpu = library.ggml_backend_reg_by_name(b"CPU")
    new = cpu and library.ggml_backend_reg_get_proc_address(cpu, b"ggml_threadpool_new")
    if not new:
        return None
    settings = ctypes.create_string_buffer(4096)  # 528 bytes in this release; we set none of them
    library.ggml_threadpool_params_init(settings, threads)
    pool: int | None = ctypes.CFUNCTYPE(c_void_p, c_void_p)(new)(ctypes.addressof(settings))
    return pool


def check(library: Any, file: Path) -> None:
    """Type the functions of a library and look whether it is the one that they are typed for.

    By its version first; then its own defaults are read through our structures, which a field more or less
    in their middle would shift.
    """
    try:
        library.llama_version.restype = c_char_p
        version = library.llama_version().decode()
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except AttributeError:
        raise _other(file, "is of another release") from None
    if version not in (VERSION, f"{VERSION}-dev"):  # the second is what a build says that set no version
        raise _other(file, f"is version {version}")
    one = c_int32(1)
    batch = {"n_tokens": 7, "token": ctypes.addressof(one)}
    for found, wanted in (
        (library.llama_model_default_params(), MODEL_DEFAULTS),
        (library.llama_context_default_params(), CONTEXT_DEFAULTS),
        (library.llama_batch_get_one(byref(one), 7), batch),
    ):
        for field, *_ in found._fields_[:-1]:
            if (getattr(found, field) or 0) != wanted.get(field, 0):
                raise _other(file, f"says {version} but has other parameters")


def _other(file: Path, why: str) -> OtherLibrary:
    return OtherLibrary(f"{file} {why}; llama.cpp {VERSION} is needed.")


class _Log:
    """Whether the line that llama.cpp is writing is that of an error."""

    error = False


@_LOG
def _log_errors(level: int, text: bytes, _: None) -> None:
    _Log.error = _Log.error if level == _CONTINUED else level == _ERROR
    if _Log.error:
        os.write(2, text)
