"""Option groups: dataclasses become options of a command, and what is typed comes back in the dataclasses."""

import inspect
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, ClassVar

import pytest
import typer
from typer.testing import CliRunner

from probeprune.cli import groups
from probeprune.cli.bench import GridOptions as BenchGrid
from probeprune.cli.compare import BudgetOptions, MeasureOptions
from probeprune.cli.options import grouped
from probeprune.cli.train import LORAPRUNE, TrainingOptions
from probeprune.data.windows import BATCH_SIZE, CALIBRATION, Text
from probeprune.errors import UsageError
from probeprune.experiment.cells import TextMeasure
from probeprune.training.settings import Training


@dataclass(frozen=True)
class Size:
    panel: ClassVar[str] = "Sizes"
    width: Annotated[int, typer.Option(help="Width in units.")] = 3
    labels: Annotated[list[str] | None, typer.Option("--label", help="A label; repeatable.")] = None


@dataclass(frozen=True)
class Place:
    folder: Annotated[Path, typer.Option("--out", help="Folder to write to.")]
    force: Annotated[bool, typer.Option("--force", help="Overwrite.")] = False


WIDE = Size(width=9)


def command_and_calls():
    """A command with two groups and plain parameters between them, and the list of its calls."""
    calls = []

    @grouped
    def cut(
        *,
        model: Annotated[str, typer.Argument(help="A model.")] = "small",
        size: Size = WIDE,
        ratio: Annotated[float, typer.Option(help="A share.")],
        place: Place,
    ) -> None:
        """Cut a model."""
        calls.append((model, size, ratio, place))

    return cut, calls


def invoke(command, *arguments):
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "100"})


def test_the_signature_has_one_keyword_per_field_in_the_order_of_the_command():
    command, _ = command_and_calls()
    parameters = inspect.signature(command).parameters
    assert list(parameters) == ["model", "width", "labels", "ratio", "folder", "force"]
    assert {p.kind for p in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}
    defaults = {name: p.default for name, p in parameters.items()}
    empty = inspect.Parameter.empty
    assert defaults == {
        "model": "small",
        "width": 9,  # the command's default, not the group's
        "labels": None,
        "ratio": empty,
        "folder": empty,
        "force": False,
    }
    assert command.__name__ == "cut" and command.__doc__ == "Cut a model."


def test_options_carry_the_panel_of_their_group_and_groups_stay_as_declared():
    command, _ = command_and_calls()
    options = {n: p.annotation.__metadata__[0] for n, p in inspect.signature(command).parameters.items()}
    assert options["width"].rich_help_panel == options["labels"].rich_help_panel == "Sizes"
    assert options["folder"].rich_help_panel is None and options["ratio"].rich_help_panel is None
    assert Size.__annotations__["width"].__metadata__[0].rich_help_panel is None
    shown = invoke(command, "--help").output
    assert "Sizes" in shown and "--label" in shown and "Overwrite." in shown and "[default: 9]" in shown


def test_typed_values_arrive_in_the_records():
    command, calls = command_and_calls()
    typed = ["big", "--width", 5, "--label", "a", "--label", "b", "--ratio", 0.5, "--out", "here", "--force"]
    assert invoke(command, *typed).exit_code == 0
    assert calls == [("big", Size(5, ["a", "b"]), 0.5, Place(Path("here"), True))]


def test_defaults_arrive_in_the_records_from_the_terminal_and_from_python():
    command, calls = command_and_calls()
    assert invoke(command, "--ratio", 0.5, "--out", "here").exit_code == 0
    command(ratio=0.5, folder=Path("here"))
    model, size, ratio, place = calls[0]
    assert (model, size.width, ratio, place) == ("small", 9, 0.5, Place(Path("here")))
    assert calls[1] == ("small", WIDE, 0.5, Place(Path("here")))


@pytest.mark.parametrize(("typed", "missing"), [(["--ratio", 0.5], "--out"), (["--out", "here"], "--ratio")])
def test_a_field_without_a_default_is_a_required_option(typed, missing):
    command, calls = command_and_calls()
    result = invoke(command, *typed)
    assert result.exit_code == 2 and missing in result.output and not calls


def test_two_groups_with_a_field_of_one_name_are_an_error():
    with pytest.raises(ValueError, match="duplicate parameter name: 'width'"):

        @grouped
        def command(*, one: Size, two: Size) -> None: ...


def test_unknown_keywords_are_an_error():
    command, _ = command_and_calls()
    with pytest.raises(TypeError, match="breadth"):
        command(ratio=0.5, folder=Path("here"), breadth=3)


# -- the groups of the commands ----------------------------------------------------------------------


def test_defaults_are_those_of_the_library():
    assert groups.CalibrationOptions().text() == CALIBRATION
    assert groups.EvaluationOptions().text() == Text(TextMeasure.corpus, 16, Text.length)
    assert TrainingOptions().settings(TrainingOptions().lora()) == Training()
    assert MeasureOptions().measure(CALIBRATION.length, seed=3) == TextMeasure(
        windows=24, batch_size=BATCH_SIZE
    )
    assert (LORAPRUNE.steps, LORAPRUNE.batch_size, LORAPRUNE.length) == (300, 128, 512)


def test_a_budget_in_tokens_is_rounded_to_steps():
    options = BudgetOptions(train_tokens=10_000, train_batch_size=4, train_length=100)
    assert options.budget().steps == 25
    assert BudgetOptions(train_tokens=1).budget().steps == 1


def test_published_sampling_is_averaged_by_batch_and_drawn_by_the_seed():
    measure = MeasureOptions(windows=0, sampling="published").measure(64, seed=3)
    assert (measure.windows, measure.averaging, measure.seed) == (None, "published", 3)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: MeasureOptions(sampling="publish").measure(64, 0), "did you mean 'published'"),
        (lambda: groups.WidthOptions(layout="evn").checked_layout(), "unknown layout 'evn'"),
        (lambda: groups.WidthOptions(skip_layers=2).checked_layout(), "leave --skip-layers out"),
        (
            lambda: groups.WidthOptions(skip_layers=2).checked_layout(
                {"budget": "flops", "allocation": None}
            ),
            "leave --skip-layers and --budget out",
        ),
        (
            lambda: BenchGrid(threads="-1").thread_counts(),
            "--threads must be a whole number of threads from 0",
        ),
    ],
)
def test_a_value_that_a_record_cannot_have_is_refused_by_the_name_of_its_option(make, says):
    with pytest.raises(UsageError) as refusal:
        make()
    assert says in str(refusal.value)


def test_every_option_of_every_group_has_a_help_text():
    for group in vars(groups).values():
        if isinstance(group, type) and group.__module__ == groups.__name__:
            hints = inspect.get_annotations(group, eval_str=True)
            for field in fields(group):
                assert hints[field.name].__metadata__[0].help.endswith("."), (group, field.name)
