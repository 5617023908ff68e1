"""A way to call commands in this process."""

import json

import pytest
from typer.testing import CliRunner


class Lori:
    """Calls commands on one workspace and insists on how they end."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, *args, code=0):
        from lori_manager.cli.app import app

        result = CliRunner().invoke(
            app, ["-C", str(self.folder), *map(str, args)], prog_name="lori"
        )
        assert result.exit_code == code, (result.output, result.exception)
        return result

    def json(self, *args, code=0):
        """The one document on stdout."""
        return json.loads(self(*args, "--json", code=code).stdout, parse_constant=pytest.fail)

    def refuses(self, *args, code):
        """The one line on stderr; nothing may be on stdout."""
        result = self("--quiet", *args, code=code)
        lines = result.stderr.splitlines()
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith("lori: ")
        assert result.stdout == ""
        return lines[0]
