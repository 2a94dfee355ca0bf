"""Keeps the Hugging Face libraries quiet while we call them, and puts them back as they were."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import huggingface_hub.utils.logging as hub_logging
import transformers.utils.logging as transformers_logging


@contextmanager
def quiet_libraries(*, bars: bool = True) -> Iterator[None]:
    """Only errors are logged inside, and progress bars are off unless `bars` is True.

    Bars are worth keeping where something may be downloaded. What goes wrong inside comes out as an
    exception: the caller turns it into one sentence, which retry notices and advice would only repeat.
    """
    before = transformers_logging.get_verbosity(), hub_logging.get_verbosity()
    hide_bars = not bars and transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    if hide_bars:
        transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(peft|transformers|torch)\.")
            yield
    finally:
        transformers_logging.set_verbosity(before[0])
        hub_logging.set_verbosity(before[1])
        if hide_bars:
            transformers_logging.enable_progress_bar()
