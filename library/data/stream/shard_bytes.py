"""The bytes of one shard from a web server, an object store or a command, in order; what breaks off goes on there.

A server that fails, stalls or sends less than it said is asked again from the byte that was wanted next: at once once,
then after waits that double. The count starts anew with each byte that comes. Where a part cannot be asked for (a
command, a server that knows no ranges) all is asked for again and passed over up to there.
"""

import base64
import contextlib
import http.client
import os
import select
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit, urlunsplit

from library.redaction import redacted, secrets_of

_PIECE = 1 << 20  # bytes asked for at once where bytes are passed over
_LAST_BYTES = 1000  # of a command's errors that are looked at
_TRANSIENT = frozenset({408, 425, 429})  # and all of 500 and more


class ShardError(Exception):
    """A shard that cannot be read, or not any further; the message says why, without its address."""


class _ForGoodError(Exception):
    """Asking again would not help."""


@dataclass(frozen=True)
class Patience:
    """How long a server is waited for.

    Attributes:
        timeout_s: for the next bytes.
        tries: in a row without a byte before the shard is given up.
        wait_s, longest_wait_s: before the second and later tries; it doubles up to the longest.
    """

    timeout_s: float = 60
    tries: int = 6
    wait_s: float = 2
    longest_wait_s: float = 30


class _Opened(Protocol):
    """Bytes of a shard from some position on."""

    total: int | None  # of the whole shard in bytes, where it is known

    def read(self, size: int) -> bytes:
        """Some bytes, none at the end."""

    def close(self) -> None:
        """Let go of it."""


class ShardStream:
    """A shard read from its beginning to its end. Positions are in bytes."""

    def __init__(self, address: str, patience: Patience) -> None:
        self._address, self._patience = address, patience
        self._position, self._failures = 0, 0
        self._opened: _Opened | None = None
        self._total: int | None = None

    def read(self, size: int) -> bytes:
        """Up to so many bytes; none at the end.

        Raises:
            ShardError: they cannot be had.
        """
        while True:
            try:
                data = self._attempt(size)
                self._failures = 0
                self._position += len(data)
                return data
            except _ForGoodError as error:
                self.close()
                raise ShardError(self._shown(str(error))) from error
            except Exception as error:  # of many kinds, by the library that reads
                self.close()
                self._failures += 1
                if self._failures >= self._patience.tries:
                    reason = f"{_reason(error)}; {self._failures} tries at byte {self._position}"
                    reason = self._shown(reason)
                    raise ShardError(reason) from error
                if self._failures > 1:
                    wait_s = self._patience.wait_s * 2 ** (self._failures - 2)
                    time.sleep(min(wait_s, self._patience.longest_wait_s))

    def close(self) -> None:
        """Let go of connection and command."""
        opened, self._opened = self._opened, None
        if opened is not None:
            with contextlib.suppress(Exception):
                opened.close()

    def _shown(self, reason: str) -> str:
        """A reason without what is secret in the address: other libraries quote parts of it."""
        return redacted(reason, secrets_of(self._address))

    def _attempt(self, size: int) -> bytes:
        if self._opened is None:
            self._opened = _opener(self._address)(self._address, self._position, self._patience.timeout_s)
            if self._total is not None and self._opened.total not in (None, self._total):
                raise _ForGoodError(f"has changed while it was read ({self._total} bytes, now {self._opened.total})")
            self._total = self._opened.total
        data = self._opened.read(size)
        if not data and self._total is not None and self._position < self._total:
            raise OSError(f"broke off at byte {self._position} of {self._total}")
        return data


def _opener(address: str) -> Callable[[str, int, float], _Opened]:
    if address.startswith("pipe:"):
        return _Command
    return _Web if address.startswith(("http://", "https://")) else _Store


class _Web:
    """From a web server."""

    def __init__(self, address: str, position: int, timeout_s: float) -> None:
        try:
            parts = urlsplit(address)
            _ = parts.port
        except ValueError as error:
            reason = "a user's name or password must be written with %2F for a slash, %40 for @, %3F for ?"
            raise _ForGoodError(f"is no address ({error}); {reason}") from error
        headers = {"User-Agent": "sdxl-pretrain", "Accept-Encoding": "identity"}
        if position:
            headers["Range"] = f"bytes={position}-"
        user, at, host = parts.netloc.rpartition("@")
        credentials = "Basic " + base64.b64encode(unquote(user).encode()).decode() if at else ""
        request = urllib.request.Request(urlunsplit(parts._replace(netloc=host)), headers=headers)
        try:
            opener = urllib.request.build_opener(_Redirects(credentials))
            self._response = opener.open(_with(request, credentials), timeout=timeout_s)
        except urllib.error.HTTPError as error:
            error.close()
            said = f"the server says {error.code} {error.reason}"
            if error.code in _TRANSIENT or error.code >= 500:
                raise OSError(said) from error
            raise _ForGoodError(said) from error
        length = self._response.headers.get("Content-Length")
        self.total = int(length) if length and length.isdecimal() else None
        if position and self._response.status == 206:
            total = self._response.headers.get("Content-Range", "").rpartition("/")[2]
            self.total = int(total) if total.isdecimal() else None
        elif position:
            _pass_over(self, position)

    def read(self, size: int) -> bytes:
        return self._response.read(size)

    def close(self) -> None:
        self._response.close()


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a server to another address; the credentials go along to the same host alone."""

    def __init__(self, credentials: str) -> None:
        self._credentials = credentials

    def redirect_request(self, req: urllib.request.Request, *args: Any) -> urllib.request.Request | None:
        new = super().redirect_request(req, *args)
        if new is None or (new.type, new.host) != (req.type, req.host) or not req.has_header("Authorization"):
            return new
        return _with(new, self._credentials)


def _with(request: urllib.request.Request, credentials: str) -> urllib.request.Request:
    """The request with credentials that no redirection copies."""
    if credentials:
        request.add_unredirected_header("Authorization", credentials)
    return request


class _Command:
    """From the standard output of a shell's command."""

    def __init__(self, address: str, position: int, timeout_s: float) -> None:
        self.total: int | None = None
        self._timeout_s = timeout_s
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(  # a shell, since that is what `pipe:` is for: the user's own command
            address.removeprefix("pipe:"),
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,  # shown as a reason, without secrets, which curl -v and set -x would print
            start_new_session=True,  # so that what the shell has started can be ended with it
        )
        assert self._process.stdout is not None
        self._output = self._process.stdout
        try:
            _pass_over(self, position)
        except BaseException:
            self.close()
            raise

    def read(self, size: int) -> bytes:
        if not select.select([self._output], [], [], self._timeout_s)[0]:
            raise TimeoutError(f"the command gave nothing for {self._timeout_s:g} s")
        data = os.read(self._output.fileno(), size)
        if not data and (status := self._process.wait(self._timeout_s)):
            raise OSError(f"the command ended with status {status}{self._said()}")
        return data

    def _said(self) -> str:
        """The last line of what the command wrote to standard error."""
        end = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, end - _LAST_BYTES))
        lines = self._errors.read().decode("utf-8", "replace").split("\n")
        return next((f": {line.strip()}" for line in reversed(lines) if line.strip()), "")

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._output.close()
        self._errors.close()


class _Store:
    """From whatever fsspec reaches: s3, gs, and others."""

    def __init__(self, address: str, position: int, timeout_s: float) -> None:
        file = store_file(address)
        try:
            self._file: Any = file.open()
        except (FileNotFoundError, PermissionError) as error:
            raise _ForGoodError(f"{type(error).__name__}: {error.strerror or 'it cannot be opened'}") from error
        self.total: int | None = getattr(self._file, "size", None)
        if position:
            self._file.seek(position)

    def read(self, size: int) -> bytes:
        return self._file.read(size)

    def close(self) -> None:
        self._file.close()


def store_file(address: str) -> Any:
    """fsspec's file of an address, not opened yet.

    Raises:
        ImportError: fsspec or what it needs for this kind of address is not installed.
        ValueError: no such kind of address is known.
    """
    import fsspec

    # Not a file system that was made before: worker processes are forked, and connections do not survive that.
    return fsspec.open(address, "rb", skip_instance_cache=True)


def _pass_over(opened: _Opened, count: int) -> None:
    while count:
        data = opened.read(min(count, _PIECE))
        if not data:
            raise OSError("is shorter than before")
        count -= len(data)


def _reason(error: Exception) -> str:
    """What an error says of itself."""
    if isinstance(error, urllib.error.URLError):
        error = error.reason if isinstance(error.reason, Exception) else OSError(str(error.reason))
    if isinstance(error, TimeoutError) and not str(error).startswith("the command"):
        return "the server stalls"
    if isinstance(error, (OSError, http.client.HTTPException)):
        return str(error) or type(error).__name__
    return f"{type(error).__name__}: {error}"
