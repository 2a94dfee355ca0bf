"""Silence the Hugging Face libraries while they are called."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import huggingface_hub.utils.logging as hub_logging
import transformers.utils.logging as transformers_logging


@contextmanager
def quiet_libraries(*, bars: bool = True) -> Iterator[None]:
    """Let the libraries log only errors inside the context, and show progress bars only if `bars` is True.

    Keep the bars for calls that may download something. Failures still raise; the caller reports them once,
    so the libraries' own warnings would be noise. Previous settings are restored at the end.
    """
    accelerate = logging.getLogger("accelerate")
    level = accelerate.level
    verbosities = transformers_logging.get_verbosity(), hub_logging.get_verbosity()
    hide_bars = not bars and transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    accelerate.setLevel(logging.ERROR)
    if hide_bars:
        transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(peft|transformers|torch)\.")
            yield
    finally:
        transformers_logging.set_verbosity(verbosities[0])
        hub_logging.set_verbosity(verbosities[1])
        accelerate.setLevel(level)
        if hide_bars:
            transformers_logging.enable_progress_bar()
