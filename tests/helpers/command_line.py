"""The command line inside a test's own process."""

import pytest

from vitapack.cli import main


def run(*words: object) -> None:
    main([str(word) for word in words])


def complaint(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line on stderr of a command that fails with exit code 2."""
    with pytest.raises(SystemExit) as caught:
        run(*words)
    captured = capsys.readouterr()
    assert caught.value.code == 2, captured.err
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert captured.out == ""
    return lines[0]
