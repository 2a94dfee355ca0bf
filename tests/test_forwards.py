"""A module whose forward or hooks are changed for a while comes back exactly as it was."""

import pytest
from torch import nn

from probeprune.model.forwards import replace_forward, temporary_hooks


def wrapped() -> nn.Linear:
    """A map whose instance has a forward of its own, as accelerate leaves it."""
    linear = nn.Linear(2, 2)
    linear.forward = lambda x: "accelerate's"  # type: ignore[method-assign, assignment]
    return linear


@pytest.mark.parametrize("make", [lambda: nn.Linear(2, 2), wrapped])
def test_a_replaced_forward_comes_back(make):
    module = make()
    before = dict(module.__dict__)
    undo = replace_forward(module, lambda x: "ours")
    assert module(1) == "ours"
    undo()
    assert module.__dict__ == before and ("forward" in before) == (make is wrapped)


def test_replacements_nest():
    module = nn.Linear(2, 2)
    outer = replace_forward(module, lambda x: "outer")
    inner = replace_forward(module, lambda x: "inner")
    assert module(1) == "inner"
    inner()
    assert module(1) == "outer"
    outer()
    assert "forward" not in module.__dict__


def test_hooks_go_also_where_a_later_one_cannot_be_registered():
    module = nn.Linear(2, 2)

    def register(fail: bool):
        yield module.register_forward_hook(lambda *_: None)
        if fail:
            raise RuntimeError("no second hook")

    with temporary_hooks(register(False)):
        assert len(module._forward_hooks) == 1
    assert not module._forward_hooks
    with pytest.raises(RuntimeError), temporary_hooks(register(True)):
        raise AssertionError("never entered")
    assert not module._forward_hooks
