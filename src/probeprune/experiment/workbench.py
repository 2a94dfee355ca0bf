"""The workbench: opens one model at a time and puts it into the state a subject describes.

Statistics of a model are kept as long as the model is open, and on disk by content. A
trained model is kept as a checkpoint beside the results, so that a broken run does not train it again.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from probeprune.data.windows import Text, WindowSource
from probeprune.experiment.cells import Subject
from probeprune.methods import Method, without_training
from probeprune.model.loading import LoadedModel, load_model
from probeprune.model.machine import cache_dir
from probeprune.model.making_records import TRAINING
from probeprune.model.placing import Work
from probeprune.plan import parts_of
from probeprune.preparation import Preparation
from probeprune.progress import Progress
from probeprune.provenance import dtype_name
from probeprune.runtime.attaching import attach
from probeprune.runtime.handle import Handle
from probeprune.strategies.schedule import Distilled, DuringTraining, Once
from probeprune.strategies.widths import Prunable
from probeprune.surgery import prune
from probeprune.training.settings import Distillation


@dataclass(frozen=True)
class Ready:
    """A model in the state that a subject describes, for as long as its context lasts.

    Attributes:
        loaded: the model (pruned, trained, or with the method attached) and its tokenizer.
        blocks: of the model as it is now.
        widths: number of units each block shows.
        removed_share: share of the dense blocks' parameters that is left out.
        handle: of the attached method; None for a trained model.
        training: what the training gave, as in training.json; None for an untrained one.
    """

    loaded: LoadedModel
    blocks: Sequence[Prunable]
    widths: Sequence[int]
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


@contextmanager
def preparing() -> Iterator[None]:
    """Raise what fails inside as `Unprepared`."""
    try:
        yield
    except Exception as error:
        raise Unprepared(error) from error


@dataclass
class Workbench:
    """Opens models for subjects.

    Attributes:
        folder: takes the checkpoints of trained ones.
        progress: called with (label, steps done, steps in all).
        trust_remote_code: let models run code of their own when they are opened.
        memory, device_map, work: as in `load_model`; a device map takes the place of a subject's device.
    """

    folder: Path
    progress: Progress
    trust_remote_code: bool = False
    memory: int | None = None
    device_map: str | None = None
    work: Work | None = None
    _name: tuple[str, str, str] | None = None
    _loaded: LoadedModel | None = None
    _preparations: dict[tuple[Text, int], Preparation] = field(default_factory=dict)

    def take(self, loaded: LoadedModel) -> None:
        """Use a model that is open already."""
        self._name = (loaded.name, dtype_name(loaded.dtype), loaded.device.type)
        self._loaded, self._preparations = loaded, {}

    def dense(self, subject: Subject) -> LoadedModel:
        """The subject's model as it was published; opening it puts the one before away."""
        if self._name != (subject.model, subject.dtype, subject.device) or self._loaded is None:
            self.release()
            self.take(self._open(subject.model, subject))
        assert self._loaded is not None
        return self._loaded

    def release(self) -> None:
        """Put the open model away."""
        self._name, self._loaded, self._preparations = None, None, {}

    @contextmanager
    def prepared(self, subject: Subject) -> Iterator[Ready]:
        """The subject, ready to be measured. Raises `Unprepared` for what calibration and the like raise."""
        with preparing():
            prepared = self._trained(subject) if subject.method.when.trains else self._attached(subject)
        try:
            yield prepared
        finally:
            if prepared.handle is not None:
                prepared.handle.detach()

    def _attached(self, subject: Subject) -> Ready:
        loaded = self.dense(subject)
        handle = attach(loaded.model, subject.method, subject.ratio, calibration=self.preparation(subject))
        return Ready(loaded, handle.blocks, handle.widths, handle.removed_share, handle)

    def source(self, subject: Subject) -> WindowSource | None:
        """The text that the subject's method is calibrated on; None for one that needs none."""
        text = subject.calibration
        if text is None:
            return None
        return text.source(self.dense(subject).tokenizer, subject.seed)

    def preparation(self, subject: Subject) -> Preparation | None:
        """Makes what methods must know of the subject's dense model; None for one that needs no calibration.

        The same object for all subjects of one model, text and seed, so that pieces are shared.
        """
        text, source = subject.calibration, self.source(subject)
        if text is None or source is None:
            return None
        key = (text, subject.seed)
        if key not in self._preparations:
            self._preparations[key] = Preparation(
                self.dense(subject).model,
                source,
                cache=cache_dir() / "statistics",
                progress=lambda what, n, of: self.progress(f"{what}, seed {subject.seed}", n, of),
                following=True,  # little work beside the refit itself
            )
        return self._preparations[key]

    # -- training ------------------------------------------------------------------------------

    def trained_folder(self, subject: Subject) -> Path:
        """Where the checkpoint of a trained subject is kept."""
        return self.folder / "trained" / f"{subject.method.name}-{subject.key}"

    def _trained(self, subject: Subject) -> Ready:
        from probeprune.jobs.train import discard_finished  # training needs an extra

        out = self.trained_folder(subject)
        discard_finished(out)
        if not (out / TRAINING).exists():
            self._train(subject, out)
        loaded = self._open(str(out), subject)
        record = loaded.training
        assert record is not None
        blocks = parts_of(loaded.model, subject.method)
        removed = 0.0 if loaded.cut is None else loaded.cut["removed_share"]
        return Ready(loaded, blocks, [b.units for b in blocks], removed, training=record)

    def _train(self, subject: Subject, out: Path) -> None:
        from probeprune.jobs.train import TrainingJob, loraprune_to, recover_to
        from probeprune.training.loraprune import LoraPruneCut

        budget, method = subject.budget, subject.method
        assert budget is not None
        training = budget.training(subject.seed)
        before: dict[str, Any] | None = None
        teacher: LoadedModel | None = None
        if isinstance(method.when, Once | Distilled):
            before = self._cut(subject, without_training(method))
        loaded, show = self.dense(subject), self._named(subject)
        nothing = Text(budget.corpus, 0)
        try:
            if isinstance(method.when, DuringTraining):
                training = replace(training, keep_best=False, warmup_steps=0)
                cut = LoraPruneCut(subject.ratio, "per-layer", method.skip_layers, method.round_to)
                loraprune_to(loaded, out, cut, TrainingJob(training, nothing, budget.text), progress=show)
            else:
                if isinstance(method.when, Distilled):
                    teacher = self._open(subject.model, subject)  # the other one has been cut
                    training = replace(training, distillation=Distillation())
                job = TrainingJob(training, nothing, budget.text)
                recover_to(loaded, out, job, teacher=teacher, merge=True, pruning=before, progress=show)
        finally:
            self.release()  # it was changed for good

    def _cut(self, subject: Subject, method: Method) -> dict[str, Any]:
        loaded = self.dense(subject)
        done = prune(loaded.model, method, subject.ratio, calibration=self.preparation(subject))
        return done.record()

    def _named(self, subject: Subject) -> Progress:
        return lambda what, n, of: self.progress(f"{subject.label}: {what}", n, of)

    def _open(self, name: str, subject: Subject) -> LoadedModel:
        return load_model(
            name,
            dtype=subject.dtype,
            device="auto" if self.device_map else subject.device,
            trust_remote_code=self.trust_remote_code and name == subject.model,
            memory=self.memory,
            device_map=self.device_map,
            work=self.work,
        )
