"""The files of a processor, which makes a multimodal model's input of images and text: carried along.

Pruning changes nothing that a processor does.
"""

import shutil
from pathlib import Path
from typing import Any

from probeprune.model.folder import check_inside, read_object

PROCESSOR = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
"""Files that transformers reads beside those of the tokenizer, if they are there; each holds one object."""


def take_processor_along(tokenizer: Any, folder: Path) -> None:
    """Copy the files of the processor that lie beside a tokenizer to where it is saved.

    Args:
        tokenizer: of a multimodal model; where it is a processor itself, it has written its files.
        folder: where it has been saved.

    Raises `UsageError` for a file that is damaged or leads out of its folder.
    """
    home = str(getattr(tokenizer, "name_or_path", None) or "")
    for name in PROCESSOR if home else ():
        file = Path(home) / name
        if file.is_file() and not (folder / name).exists():
            check_inside(file)
            read_object(file)
            shutil.copyfile(file, folder / name)
