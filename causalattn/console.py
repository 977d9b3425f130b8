"""What every command does on a terminal: progress, files all at once or none, errors in one line."""

import os
import sys
import time
from pathlib import Path


class CommandError(Exception):
    """What the user is told in one line."""


class Progress:
    """A bar over layers, or what else is counted, on stderr; nothing where stderr is no terminal.

    rate: also how many a second, since the first call.
    """

    def __init__(self, title: str, counted: str = "layers", rate: bool = False):
        self.title, self.counted, self.rate = title, counted, rate
        self.first: tuple[int, float] | None = None
        self.shown = sys.stderr.isatty()

    def __call__(self, done: int, total: int) -> None:
        if self.shown:
            bar = "█" * (24 * done // total)
            line = f"\r{self.title}: {bar:<24} {done}/{total} {self.counted}{self._speed(done) if self.rate else ''}"
            print(line, end="", file=sys.stderr, flush=True)

    def _speed(self, done: int) -> str:
        now = time.monotonic()
        if self.first is None:
            self.first = done, now
        since, began = self.first
        return f", {(done - since) / (now - began):.1f} a second\033[K" if done > since and now > began else "\033[K"

    def close(self) -> None:
        if self.shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def write(files: dict[Path, bytes]) -> None:
    """Write all files or, on an error, none: each under another name first, then renamed."""
    written: dict[Path, Path] = {}
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                raise CommandError(f"a folder is in the way: {path}")
            written[path] = path.with_name(f".{path.name}.{os.getpid()}.part")
            written[path].write_bytes(content)
        for path, part in written.items():
            part.replace(path)
    finally:
        for part in written.values():
            part.unlink(missing_ok=True)


def read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise CommandError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise CommandError(f"{path} could not be read: {error.strerror}") from error


def one_line(error: Exception) -> str:
    """The first line of an error that has words on it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
