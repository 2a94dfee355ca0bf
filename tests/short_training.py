"""A short training run for tests: text, settings, and a callback that ends it as a kill would."""

from tiny import token_ids
from transformers import TrainerCallback

from probeprune.training.settings import Training

TEXT, HELD_OUT = token_ids(32, 16, seed=1), token_ids(4, 16, seed=2)
SHORT = Training(
    steps=6, batch_size=8, micro_batch=4, length=16, warmup_steps=1, evaluate_every=2, learning_rate=3e-3
)


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    """Raises in the middle of a step, as a kill would: nothing is cleaned up."""

    def __init__(self, step):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed
