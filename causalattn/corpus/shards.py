"""Shards as files: a table and its manifest, each whole or not there, whatever happens meanwhile."""

import hashlib
import json
import os
import re
from pathlib import Path

from .settings import first_difference

# what starts with _ or . is no part of the data where a folder is read as one table
SETTINGS = "_corpus.json"
LEFTOVER = re.compile(r"\._?(?:part|corpus)-(\d+)\.(?:parquet|json)\.tmp")


class Shards:
    """The shards of one rank in a folder that all ranks share.

    Shard n is part-n.parquet, and _part-n.json, its manifest. It counts once the manifest is there and names the very
    bytes of the table; until then it is as if there were nothing. Number n is rank n % world_size's, leftovers too.
    """

    def __init__(self, folder: Path, settings: dict, rank: int, world_size: int):
        self.folder, self.settings, self.rank = folder, settings, rank
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"out must be a folder, got the file {folder}")
        self._check_settings()
        for path in folder.glob(".*.tmp"):
            left = LEFTOVER.fullmatch(path.name)
            if left and int(left[1]) % world_size == rank:
                path.unlink(missing_ok=True)

    def done(self, n: int) -> dict | None:
        """The manifest of a shard that counts."""
        table, manifest = self._paths(n)
        try:
            found = json.loads(manifest.read_bytes())
            whole = hashlib.sha256(table.read_bytes()).hexdigest() == found["sha256"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        return found if whole else None

    def commit(self, n: int, table: bytes, manifest: dict) -> dict:
        """Put a shard there, its manifest last, and return the manifest; on an error nothing of it stays."""
        self._begin()
        manifest = manifest | {"bytes": len(table), "sha256": hashlib.sha256(table).hexdigest()}
        paths = self._paths(n)
        parts = [path.with_name(f".{path.name}.tmp") for path in paths]
        placed = []
        try:
            for part, content in zip(parts, (table, _json(manifest)), strict=True):
                _write(part, content)
            for part, path in zip(parts, paths, strict=True):
                os.replace(part, path)
                placed.append(path)
                _sync(self.folder)
        except BaseException:
            for path in reversed(placed):
                path.unlink(missing_ok=True)
            raise
        finally:
            for part in parts:
                part.unlink(missing_ok=True)
        return manifest

    def _paths(self, n: int) -> tuple[Path, Path]:
        return self.folder / f"part-{n:05d}.parquet", self.folder / f"_part-{n:05d}.json"

    def _check_settings(self) -> bool:
        """Whether the job has begun; what is there must be of this very job."""
        # looked for first: another rank may begin at any moment
        part = next(self.folder.glob("part-*"), None)
        try:
            was = json.loads((self.folder / SETTINGS).read_bytes())
        except FileNotFoundError:
            if part is not None:
                raise ValueError(f"out must be empty or hold a job's {SETTINGS}, got {part} without it") from None
            return False
        except ValueError:
            was = None
        if not isinstance(was, dict) or "schema" not in was:
            raise ValueError(f"out must be empty or hold a job's {SETTINGS}, got another {self.folder / SETTINGS}")
        difference = first_difference(was, self.settings)
        if difference:
            raise ValueError(f"{self.folder} was begun with {difference}")
        return True

    def _begin(self) -> None:
        """Say what job this is before the first shard is there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._check_settings():
            return
        part = self.folder / f".corpus-{self.rank:05d}.json.tmp"
        try:
            _write(part, _json(self.settings))
            os.replace(part, self.folder / SETTINGS)
            _sync(self.folder)
        finally:
            part.unlink(missing_ok=True)


def _json(value: dict) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def _write(path: Path, content: bytes) -> None:
    """Write a file onto the disk itself; an error names the file."""
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _sync(folder: Path) -> None:
    """A rename is on the disk once its folder is."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
