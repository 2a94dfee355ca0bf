"""The workbench: opens one model at a time and puts it into the state a subject describes.

What was collected on a model (statistics, gradients) is kept while the model is, and on disk by content. A
trained model is kept as a checkpoint beside the results, so that a broken run does not train it again.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from probeprune.calibration.collecting import calibrate
from probeprune.calibration.statistics import Statistics
from probeprune.data.corpora import load_corpus
from probeprune.data.windows import Text, calibration_windows
from probeprune.experiment.cells import Subject
from probeprune.jobs.train import TrainingJob, loraprune_to, recover_to
from probeprune.methods import Method, refit_of
from probeprune.model.blocks import Block, find_blocks
from probeprune.model.loading import LoadedModel, cache_dir, load_model
from probeprune.progress import Progress
from probeprune.provenance import dtype_name
from probeprune.runtime.handle import Handle, attach
from probeprune.strategies.allocation import Damage
from probeprune.strategies.compensation import Consumer
from probeprune.surgery import method_consumers, method_damages, method_saliences, prune
from probeprune.training.loraprune import LoraPruneCut

BATCH_SIZE = 16
"""Windows a forward pass of calibration."""


@dataclass(frozen=True)
class Prepared:
    """A model in the state that a subject describes, for as long as its context lasts.

    Attributes:
        loaded: the model (pruned, trained, or with the method attached) and its tokenizer.
        blocks: of the model as it is now.
        kept: units each block shows.
        removed_share: share of the dense blocks' parameters that is left out.
        handle: of the attached method; None for a trained model.
        training: what the training gave, as in training.json; None for an untrained one.
    """

    loaded: LoadedModel
    blocks: Sequence[Block]
    kept: Sequence[int]
    removed_share: float
    handle: Handle | None = None
    training: dict[str, Any] | None = None


class Unprepared(Exception):
    """A subject that could not be brought about, whatever it was to be measured on.

    Attributes:
        cause: why.
    """

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


@dataclass
class Workbench:
    """Opens models for subjects; `folder` takes the checkpoints of trained ones."""

    folder: Path
    progress: Progress
    trust_remote_code: bool = False
    _name: tuple[str, str, str] | None = None
    _loaded: LoadedModel | None = None
    _known: dict[Any, Any] = field(default_factory=dict)

    def take(self, loaded: LoadedModel) -> None:
        """Use a model that is open already."""
        self._name = (loaded.name, dtype_name(loaded.dtype), loaded.device.type)
        self._loaded, self._known = loaded, {}

    def dense(self, subject: Subject) -> LoadedModel:
        """The subject's model as it was published; opening it puts the one before away."""
        if self._name != (subject.model, subject.dtype, subject.device) or self._loaded is None:
            self.release()
            self.take(self._open(subject.model, subject))
        assert self._loaded is not None
        return self._loaded

    def release(self) -> None:
        """Put the open model away."""
        self._name, self._loaded, self._known = None, None, {}

    @contextmanager
    def prepared(self, subject: Subject) -> Iterator[Prepared]:
        """The subject, ready to be measured. Raises `Unprepared` for what calibration and the like raise."""
        try:
            prepared = (
                self._trained(subject) if subject.method.training != "none" else self._attached(subject)
            )
        except Exception as error:
            raise Unprepared(error) from error
        try:
            yield prepared
        finally:
            if prepared.handle is not None:
                prepared.handle.detach()

    def _attached(self, subject: Subject) -> Prepared:
        loaded, statistics = self.dense(subject), self.statistics(subject)
        handle = attach(loaded.model, subject.method, subject.ratio, statistics=statistics)
        return Prepared(loaded, handle.blocks, handle.kept, handle.removed_share, handle)

    def statistics(self, subject: Subject) -> Statistics:
        """What the subject's method needs to know of its dense model."""
        method, moments, found = subject.method, {}, {}
        if method.needs_moments:
            assert subject.calibration is not None
            key = (subject.calibration, subject.seed)
            if key not in self._known:
                self._known[key] = self._moments(subject, subject.calibration)
            moments = self._known[key].moments
        if method.needs_gradients:
            # A recovery after the cut needs what the cut alone needs.
            own = (method.importance, method.gradients, method.seed, subject.calibration, subject.seed)
            if own not in self._known:
                self._known[own] = method_saliences(
                    self.dense(subject).model,
                    method,
                    self.gradient_windows(subject),
                    cache=cache_dir() / "statistics",
                    progress=lambda n, of: self.progress(f"gradients {method.name}", n, of),
                )
            found = self._known[own]
        known = Statistics(moments, found)
        if method.needs_damages:
            known = replace(known, damages=self._damages(subject))
        if method.needs_refit and subject.ratio:
            known = replace(known, consumers=self._consumers(subject, known))
        return known

    def _damages(self, subject: Subject) -> dict[str, Damage]:
        """The same for all ratios."""
        assert subject.calibration is not None
        method = subject.method
        how = (method.refit, method.units, method.seed, method.budget)
        own = ("damages", how, subject.calibration, subject.seed)
        if own not in self._known:
            self._known[own] = method_damages(
                self.dense(subject).model,
                method,
                self.windows(subject, subject.calibration),
                BATCH_SIZE,
                cache_dir() / "statistics",
                self._named(subject),
            )
        found: dict[str, Damage] = self._known[own]
        return found

    def _consumers(self, subject: Subject, known: Statistics) -> dict[str, Consumer]:
        """Only those last asked for are kept: they are as large as the weights they stand for."""
        assert subject.calibration is not None
        method = refit_of(subject.method)  # what following takes is little work beside the refit
        own = (method, subject.ratio, subject.calibration, subject.seed)
        if self._known.get("refit", (None,))[0] != own:
            found = method_consumers(
                self.dense(subject).model,
                method,
                subject.ratio,
                self.windows(subject, subject.calibration),
                statistics=known,
                batch_size=BATCH_SIZE,
                cache=cache_dir() / "statistics",
                progress=self._named(subject),
            )
            self._known["refit"] = (own, found)
        consumers: dict[str, Consumer] = self._known["refit"][1]
        return consumers

    def _moments(self, subject: Subject, text: Text) -> Statistics:
        return calibrate(
            self.dense(subject).model,
            self.windows(subject, text),
            batch_size=BATCH_SIZE,
            cache=cache_dir() / "statistics",
            progress=lambda n, of: self.progress(f"calibration, seed {subject.seed}", n, of),
        )

    def windows(self, subject: Subject, text: Text) -> torch.Tensor:
        """Calibration windows of that text for this subject."""
        return calibration_windows(
            load_corpus(text.corpus),
            self.dense(subject).tokenizer,
            count=text.windows,
            length=text.length,
            seed=subject.seed,
        )

    def gradient_windows(self, subject: Subject) -> torch.Tensor:
        """As many and as long as the subject's method takes gradients on."""
        want, text = subject.method.gradients, subject.calibration
        assert want is not None and text is not None
        return self.windows(subject, replace(text, windows=want.windows, length=want.length))

    # -- training ------------------------------------------------------------------------------

    def trained_folder(self, subject: Subject) -> Path:
        """Where the checkpoint of a trained subject is kept."""
        return self.folder / "trained" / f"{subject.method.name}-{subject.key}"

    def _trained(self, subject: Subject) -> Prepared:
        out = self.trained_folder(subject)
        if not (out / "training.json").exists():
            self._train(subject, out)
        record = json.loads((out / "training.json").read_text(encoding="utf-8"))
        loaded = self._open(str(out), subject)
        blocks = find_blocks(loaded.model, subject.method.units)
        removed = (record.get("pruning") or record).get("removed_share", 0.0)
        return Prepared(loaded, blocks, [b.units for b in blocks], removed, training=record)

    def _train(self, subject: Subject, out: Path) -> None:
        budget, method = subject.budget, subject.method
        assert budget is not None
        training = budget.training(subject.seed)
        before: dict[str, Any] | None = None
        if method.training == "after" and method.when == "once":
            before = self._cut(subject, replace(method, training="none"))
        loaded, show = self.dense(subject), self._named(subject)
        nothing = Text(budget.corpus, 0)
        try:
            if method.training == "during":
                training = replace(training, keep_best=False, warmup_steps=0)
                cut = LoraPruneCut(subject.ratio, "per-layer", method.skip_layers, method.round_to)
                loraprune_to(loaded, out, cut, TrainingJob(training, nothing, budget.text), progress=show)
            else:
                job = TrainingJob(training, nothing, budget.text)
                recover_to(loaded, out, job, merge=True, pruning=before, progress=show)
        finally:
            self.release()  # it was changed for good

    def _cut(self, subject: Subject, method: Method) -> dict[str, Any]:
        loaded, statistics = self.dense(subject), self.statistics(subject)
        done = prune(loaded.model, method, subject.ratio, statistics=statistics)
        return done.record()

    def _named(self, subject: Subject) -> Progress:
        return lambda what, n, of: self.progress(f"{subject.label}: {what}", n, of)

    def _open(self, name: str, subject: Subject) -> LoadedModel:
        return load_model(
            name,
            dtype=subject.dtype,
            device=subject.device,
            trust_remote_code=self.trust_remote_code and name == subject.model,
        )
