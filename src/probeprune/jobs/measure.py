"""Perplexity on one text, and agreement with another model, before and after a model is changed."""

from pathlib import Path
from typing import Any

from probeprune.data.corpora import load_corpus
from probeprune.data.windows import Text, evaluation_windows
from probeprune.evaluation.agreement import agreement
from probeprune.evaluation.perplexity import perplexity
from probeprune.files import stored_json, write_json
from probeprune.model.fingerprint import source_fingerprint
from probeprune.model.loading import LoadedModel
from probeprune.model.machine import release_freed
from probeprune.progress import Progress


class Measure:
    """Measures perplexity on one text, once for each name given to a state of the model.

    Args:
        loaded: the model whose tokenizer is used.
        text: the text to measure on; with 0 windows nothing is measured.
        progress: called with (`perplexity` and the name, windows done, windows in all).
        batch_size: windows per forward pass.
        keep: a file that stores the figures, for a run that is resumed: it can no longer measure the model as
            it was before training.
        reference: a model that agreement is measured with, beside perplexity; None measures none.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        text: Text,
        progress: Progress,
        batch_size: int = 16,
        keep: Path | None = None,
        reference: LoadedModel | None = None,
    ) -> None:
        self.text, self.progress, self.batch_size, self.keep = text, progress, batch_size, keep
        self.reference = reference
        self.figures: dict[str, float] = {}
        self.agreements: dict[str, dict[str, Any]] = {}
        if keep is not None:
            self._measured = {
                **text.record(),
                "model": loaded.name,
                "weights": source_fingerprint(loaded.name),
            }
            if reference is not None:
                self._measured["reference"] = [reference.name, source_fingerprint(reference.name)]
            stored = stored_json(keep)
            if isinstance(stored, dict) and stored.get("of") == self._measured:
                self.figures, self.agreements = stored["figures"], stored.get("agreement", {})
        self.windows = None
        if text.windows:
            self.windows = evaluation_windows(
                load_corpus(text.corpus), loaded.tokenizer, length=text.length, limit=text.windows
            )

    def __call__(self, name: str, model: Any) -> None:
        """Measure `model` and store the figures under `name`, unless there are some of that name."""
        if self.windows is None or name in self.figures:
            return
        result = perplexity(
            model,
            self.windows,
            batch_size=self.batch_size,
            progress=lambda _, done, total: self.progress(f"perplexity {name}", done, total),
        )
        release_freed()
        self.figures[name], self.figures[f"{name}_error"] = result.value, result.standard_error
        if self.reference is not None:
            self.agreements[name] = agreement(
                model,
                self.reference.model,
                self.windows,
                batch_size=self.batch_size,
                progress=lambda _, done, total: self.progress(f"agreement {name}", done, total),
            ).record()
        if self.keep is not None:
            figures = {"figures": self.figures, "agreement": self.agreements}
            write_json(self.keep, {"of": self._measured, **figures})

    def record(self) -> dict[str, Any] | None:
        """The text and the figures; None if nothing was measured."""
        if not self.figures:
            return None
        agreements = {"agreement": self.agreements} if self.agreements else {}
        return {**self.text.record(), "perplexity": self.figures, **agreements}
