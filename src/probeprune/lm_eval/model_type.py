"""The model type itself. Importing this file registers it, and needs the extra `eval`."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from probeprune.data.windows import CALIBRATION, Text
from probeprune.errors import UsageError, quoted, unknown
from probeprune.evaluation.harness import LiveModel
from probeprune.foreign.extras import extra
from probeprune.jobs.attached import load_model
from probeprune.jobs.keep import attachment
from probeprune.methods import get_method
from probeprune.model.loading import EMBEDDED_MODEL
from probeprune.ranges import plain
from probeprune.runtime.attaching import attach_again

with extra("eval"):
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import register_model

_ARGUMENTS = (
    "pretrained",
    "method",
    "ratio",
    "calibration",
    "calibration_windows",
    "length",
    "seed",
    "dtype",
    "device",
    "batch_size",
    "max_length",
    "trust_remote_code",
)


@register_model("probeprune")
class PrunedLM(LiveModel):
    """A model with or without a method attached, for the harness to score.

    Requests are batched within their task, padded on the right and masked when they are scored, padded on the
    left and masked when text is generated, and every task begins with the method attached anew. So a result
    depends on the batch size and on no other task of the same run.

    Args:
        pretrained: any model that `probeprune.load_model` opens: the embedded one, a dense or a pruned
            checkpoint, a folder that keeps a method, a hub id.
        method, ratio: a method to attach, and its ratio; none by default.
        calibration, calibration_windows, length, seed: the text that the method is calibrated on, as options
            of the commands.
        dtype, device, trust_remote_code: as in `load_model`.
        batch_size: requests per forward pass; a number.
        max_length: the most tokens of a request; None for the model's positions.

    Raises `UsageError` for arguments that are not here, and as `load_model` and `attach` do.
    """

    def __init__(
        self,
        pretrained: str = EMBEDDED_MODEL,
        *,
        method: str | None = None,
        ratio: float | None = None,
        calibration: str = CALIBRATION.corpus,
        calibration_windows: int = CALIBRATION.windows,
        length: int = CALIBRATION.length,
        seed: int = 0,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        trust_remote_code: bool = False,
        **others: Any,
    ) -> None:
        for name in others:
            raise UsageError(unknown("model argument", name, _ARGUMENTS))
        if (method is None) != (ratio is None):
            raise UsageError("method and ratio go together; give both model arguments, or neither.")
        if not str(batch_size).isdecimal():
            raise UsageError(
                f"batch_size must be a number, not {quoted(batch_size)}: a dynamic method chooses for each "
                "batch."
            )
        size = plain("batch_size", int(batch_size))
        text = Text(str(calibration), plain("windows", calibration_windows), plain("length", length))
        loaded = load_model(
            str(pretrained), dtype=dtype, device=device or "auto", trust_remote_code=bool(trust_remote_code)
        )
        kept = None
        if loaded.handle is not None:
            if method is not None:
                raise UsageError(f"'{pretrained}' keeps a method of its own; leave method and ratio out.")
            kept = loaded.handle.kept
            loaded.handle.detach()
        elif method is not None:
            kept, _ = attachment(loaded, get_method(method), plain("ratio", ratio), text, plain("seed", seed))
        super().__init__(loaded.model, loaded.tokenizer, batch_size=size)
        self._max_length = max_length
        self._kept = kept

    def _attached(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._kept is None else attach_again(self.model, self._kept)

    def _by_task(
        self, answer: Callable[..., list[Any]], requests: Sequence[Instance], disable_tqdm: bool
    ) -> list[Any]:
        """Answers to requests, each task by itself under a method that begins anew."""
        tasks: dict[Any, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            tasks[request.task_name].append(i)
        answers: dict[int, Any] = {}
        for own in tasks.values():
            with self._attached():
                found = answer([requests[i] for i in own], disable_tqdm=disable_tqdm)
            answers |= zip(own, found, strict=True)
        return [answers[i] for i in range(len(requests))]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations."""
        return self._by_task(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts."""
        return self._by_task(super().loglikelihood_rolling, requests, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts up to a stop sequence."""
        return self._by_task(super().generate_until, requests, disable_tqdm)
