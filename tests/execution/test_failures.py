"""What a worker raised is reported, and a run that is stopped ends with the usual status."""

import io
import signal

import pytest
import typer
from rich.console import Console

from qbert_ray.execution.failures import root_cause, stoppable


class WrapperError(Exception):
    """As Ray's errors, which hold the one of the worker."""

    def __init__(self, **inner):
        super().__init__("wrapped")
        self.__dict__ |= inner


CAUSE = ValueError("no column price")


@pytest.mark.parametrize(
    "error",
    [
        CAUSE,
        WrapperError(cause=CAUSE),
        WrapperError(worker_failures={1: WrapperError(cause=CAUSE), 2: KeyError("later")}),
        WrapperError(controller_failure=WrapperError(worker_failures={0: CAUSE})),
        WrapperError(_base_exc=CAUSE),
    ],
    ids=["itself", "task", "workers", "controller", "unpickled"],
)
def test_the_cause_is_what_the_worker_raised(error):
    assert root_cause(error) is CAUSE


@pytest.mark.parametrize("inner", [{"cause": "a text"}, {"worker_failures": {}}, {"cause": None}])
def test_an_error_that_holds_no_other_is_its_own_cause(inner):
    error = WrapperError(**inner)
    assert root_cause(error) is error


def test_an_error_that_names_itself_ends_the_search():
    error = WrapperError()
    error.cause = error
    assert root_cause(error) is error


@pytest.fixture
def interruptible():
    """Ctrl-C raises KeyboardInterrupt, as in a terminal; a shell that starts the tests in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_command_with_one_line_and_its_status(interruptible, number, status):
    console, before = Console(file=io.StringIO()), signal.getsignal(signal.SIGTERM)
    with pytest.raises(typer.Exit) as end, stoppable(console):
        signal.raise_signal(number)
    assert end.value.exit_code == status
    assert console.file.getvalue() == "stopped; run the same command again to resume\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_errors_pass_and_the_handler_is_put_back():
    console, before = Console(file=io.StringIO()), signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="no column price"), stoppable(console):
        raise CAUSE
    assert console.file.getvalue() == "" and signal.getsignal(signal.SIGTERM) is before
