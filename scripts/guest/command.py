"""Running other programs, and how these scripts speak and fail."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

STARTED = time.monotonic()


class BuildError(Exception):
    """The image cannot be built; the message says why, and the way out."""


def say(message: str) -> None:
    """Report a step, with the seconds since the start."""
    print(f"{Path(sys.argv[0]).name}: {time.monotonic() - STARTED:5.1f} s  {message}", flush=True)


def run(*command: str | Path, cwd: Path | None = None, text: str | None = None) -> str:
    """Run a program, `text` being its input, and return its output.

    Raises:
        BuildError: it is not installed, or it failed; with its own message.
    """
    try:
        done = subprocess.run(
            command, cwd=cwd, input=text, capture_output=True, check=True, text=True
        )
    except FileNotFoundError as error:
        raise BuildError(
            f"{command[0]} is not installed; --help names the Debian packages"
        ) from error
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip() or f"exit status {error.returncode}"
        raise BuildError(f"{Path(command[0]).name}: {said}") from error
    return done.stdout


def exit_with(main: Callable[[], None]) -> None:
    """Run a script's main function; a BuildError ends it with its message and exit status 1."""
    try:
        main()
    except BuildError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
