"""The commands of ``afflux bench`` explain themselves and refuse what can't work."""

import pytest
from typer.testing import CliRunner

from afflux.main import app


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("elastic", ["--cycles", "--emulate", "1A1F", "--png"]),
        ("chaos", ["--kills", "--seed", "SIGSTOP", "--frontend"]),
        ("metrics", ["--pairs", "--batch", "2 %"]),
    ],
)
def test_help(command: str, words: list[str]):
    result = CliRunner().invoke(app, ["bench", command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for word in words:
        assert word in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["chaos", "--kills", "0", "--repeats", "0"], "nothing to do"),
        (["elastic", "--set", "no_such=1"], "no_such"),
        (["chaos", "--set", "ffn.count=40"], "ffn.count"),
    ],
)
def test_refusals(arguments: list[str], words: str):
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 1
    assert words in result.output
