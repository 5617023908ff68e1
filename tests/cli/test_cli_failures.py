"""How commands end: one line on stderr and the error's own exit code."""

import errno

import pytest
import typer
from typer.testing import CliRunner

from lori_manager.cli.session import FailingGroup, Session
from lori_manager.errors import EndedElsewhere, LoriError


def run(error, verbose=0):
    app = typer.Typer(cls=FailingGroup, rich_markup_mode=None, pretty_exceptions_enable=False)

    @app.callback()
    def options(ctx: typer.Context):
        ctx.obj = Session(".", verbose)

    @app.command()
    def fail():
        raise error

    return CliRunner().invoke(app, ["fail"])


@pytest.mark.parametrize("kind", LoriError.__subclasses__())
def test_a_lori_error_is_one_line_and_its_exit_code(kind):
    result = run(kind("line one\nline two"))
    assert result.exit_code == kind.exit_code
    assert result.stderr == "lori: line one line two\n"
    assert result.stdout == ""


def test_exit_codes_are_all_different():
    codes = [kind.exit_code for kind in LoriError.__subclasses__() if kind is not EndedElsewhere]
    assert EndedElsewhere.exit_code == 1  # no input's fault: whoever started the processes sees why
    assert len(set(codes)) == len(codes)
    assert not {0, 1, 130} & set(codes)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_disk_that_refuses_ends_with_9(code):
    result = run(OSError(code, "reason", "/some/file"))
    assert result.exit_code == 9
    assert result.stderr.startswith("lori: /some/file: reason")
    assert len(result.stderr.splitlines()) == 1


def test_an_interrupt_ends_with_130_and_says_how_to_go_on():
    result = run(KeyboardInterrupt())
    assert result.exit_code == 130
    assert result.stderr.splitlines() == [
        "lori: interrupted; what was stored stays, and the same command goes on from there"
    ]


def test_a_bug_is_one_line_that_asks_for_a_report():
    result = run(ZeroDivisionError("division by zero"))
    assert result.exit_code == 1
    assert result.stderr.startswith("lori: ZeroDivisionError: division by zero; this is a bug")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("how", ["flag", "environment"])
def test_the_traceback_of_a_bug_is_shown_on_request(monkeypatch, how):
    monkeypatch.setenv("LORI_DEBUG", "1" if how == "environment" else "0")
    result = run(ZeroDivisionError("division by zero"), verbose=int(how == "flag"))
    assert result.exit_code == 1
    assert "Traceback (most recent call last)" in result.stderr


def test_a_reader_that_closes_the_pipe_is_no_bug():
    result = run(BrokenPipeError(errno.EPIPE, "Broken pipe"))
    assert result.exit_code == 1
    assert result.stderr == ""
