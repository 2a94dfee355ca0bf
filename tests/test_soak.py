"""A short soak: the same sequences of steps each time. `make soak` runs many others (`tests/soak`)."""

from soak import machine


def test_what_callers_do_in_any_order_is_right_or_refused():
    machine.TOTAL.clear()
    machine.run(examples=10, steps=4, derandomize=True)
    assert machine.mostly_run() and machine.TOTAL["attach", "ran"] >= 10, machine.report()
