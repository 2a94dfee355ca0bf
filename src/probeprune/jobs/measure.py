"""Perplexity of one text before and after something is done to a model."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from probeprune.data.corpora import load_corpus
from probeprune.data.windows import Text, evaluation_windows
from probeprune.evaluation.perplexity import perplexity
from probeprune.files import write_json
from probeprune.model.loading import LoadedModel, source_fingerprint
from probeprune.progress import Progress


class Measure:
    """Perplexity on one text, again and again: before and after something is done to a model.

    Args:
        loaded: whose tokenizer cuts the text.
        text: to measure on; 0 windows measures nothing.
        progress: called with (what, windows done, windows in all).
        batch_size: windows a forward pass.
        keep: a file that remembers the figures, so that a run that was broken off does not measure again what
            it no longer can: the model before it was trained.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        text: Text,
        progress: Progress,
        batch_size: int = 16,
        keep: Path | None = None,
    ) -> None:
        self.text, self.progress, self.batch_size, self.keep = text, progress, batch_size, keep
        self.figures: dict[str, float] = {}
        if keep is not None:
            self._of = {**asdict(text), "model": loaded.name, "weights": source_fingerprint(loaded.name)}
            if keep.exists():
                kept = json.loads(keep.read_text(encoding="utf-8"))
                if kept["of"] == self._of:
                    self.figures = kept["figures"]
        self.windows = None
        if text.windows:
            self.windows = evaluation_windows(
                load_corpus(text.corpus), loaded.tokenizer, length=text.length, limit=text.windows
            )

    def __call__(self, what: str, model: Any) -> None:
        """Measure `model` and keep the figure under this name."""
        if self.windows is None or what in self.figures:
            return
        found = perplexity(
            model,
            self.windows,
            batch_size=self.batch_size,
            progress=lambda _, done, total: self.progress(f"perplexity {what}", done, total),
        )
        self.figures[what], self.figures[f"{what}_error"] = found.value, found.standard_error
        if self.keep is not None:
            write_json(self.keep, {"of": self._of, "figures": self.figures})

    def record(self) -> dict[str, Any] | None:
        """The text and the figures; None where nothing was measured."""
        return {**asdict(self.text), "perplexity": self.figures} if self.figures else None
