"""Texts without secrets: credentials and query strings of addresses, keys in a pipe's command, tokens.

Whatever a run prints or writes goes through `redacted`: the messages of its errors do so when they are made, its log
and its tracebacks when they are shown. `secrets_of` says what of one address is secret, for errors of other libraries,
which quote parts of addresses.
"""

import os
import re
import shlex
from collections.abc import Iterable, Mapping
from urllib.parse import unquote

_HIDDEN = "…"
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?P<rest>[^\s'\"<>]*)")
_PORT = re.compile(r"[\d{}.,]*")  # braces stand for several
_HOST = re.compile(r"localhost|\[.*|.*\..*")  # what is hardly a user's name
# Schemes without a user in them: there an @ belongs to a path.
_STORES = ("s3://", "gs://", "gcs://", "hf://", "file://")
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=.*", re.DOTALL)
_TELLING_OPTION = re.compile(r"-[uHp]|--?(user|header|.*(passw|token|secret|key|auth|cookie).*)", re.IGNORECASE)
_COMMAND = re.compile(r"[\w./+-]+")
_FILE = re.compile(r"[\w./{},+~%-]*\.tar")
_TELLING_VARIABLE = re.compile(r".*(TOKEN|SECRET|PASSWORD|PASSWD|ACCESS_KEY|API_KEY|ACCESS_KEY_ID)")
# Letters of a secret that is looked for in errors about its address, and in all texts: shorter ones are parts of words.
_SHORTEST, _SHORTEST_EVERYWHERE = 4, 6
_known: set[str] = set()


def redacted(text: str, secrets: Iterable[str] = ()) -> str:
    """The text with its addresses as `shown_address` has them, and without secrets that are known.

    Args:
        secrets: besides those of the addresses that were given to `remember`, and of the environment's tokens.
    """
    text = _URL.sub(lambda match: _shown_url(match["scheme"], match["rest"]), text)
    for secret in sorted({*secrets, *_known, *_of_environment()}, key=len, reverse=True):
        if len(secret) >= _SHORTEST:
            text = text.replace(secret, _HIDDEN)
    return text


def remember(address: str) -> None:
    """Keep this address's secrets out of every text that is redacted from now on."""
    _known.update(secret for secret in secrets_of(address) if len(secret) >= _SHORTEST_EVERYWHERE)


def remember_all(values: object) -> None:
    """`remember` the addresses among some values: a text, or a list or table of such."""
    if isinstance(values, str) and (values.startswith("pipe:") or "://" in values):
        remember(values)
    elif isinstance(values, Mapping):
        remember_all(list(values.values()))
    elif isinstance(values, (list, tuple)):
        for value in values:
            remember_all(value)


def shown_address(address: str) -> str:
    """A whole address for messages: a URL without credentials and query string; of a pipe its program and last file."""
    if address.startswith("pipe:"):
        return _shown_pipe(address.removeprefix("pipe:"))
    parts = re.split(r"::(?=[A-Za-z][A-Za-z0-9+.-]*://)", address)
    return "::".join(_shown_url(*_split(part)) for part in parts)


def secrets_of(address: str) -> set[str]:
    """What of an address may be nowhere but there: user and password, values of its query, keys of a pipe."""
    found: set[str] = set()
    if address.startswith("pipe:"):
        words = _words(address.removeprefix("pipe:"))
        for before, word in zip(["", *words], words, strict=False):
            if "=" not in before and _TELLING_OPTION.fullmatch(before):
                found |= {word, *re.split(r"[:\s]+", word)[1:]} - {"Bearer", "Basic"}
            name, assigned, value = word.partition("=")
            if assigned and re.fullmatch(r"-{0,2}\w[\w-]*", name):
                found.add(value)
            found |= {secret for match in _URL.finditer(word) for secret in _secrets_of_url(match["rest"])}
        return {secret for secret in found if secret and secret not in _shown_pipe(address)}
    scheme, rest = _split(address)
    return set() if scheme.lower() in _STORES and ":" not in rest.rpartition("@")[0] else _secrets_of_url(rest)


def _split(address: str) -> tuple[str, str]:
    scheme, mark, rest = address.partition("://")
    return (scheme + mark, rest) if mark else ("", address)


def _secrets_of_url(rest: str) -> set[str]:
    head, tail = _head_and_tail(rest)
    users = head.rpartition("@")[0]
    if not users and ":" in head and "@" in tail:  # a password with a question mark
        users = rest.rpartition("@")[0]
    name, _, password = users.partition(":")
    found = {users, password, *re.split(r"[@/?#]", password)} | ({name} if users and not password else set())
    for value in re.split(r"[&;]", tail[1:]):
        found |= {value.partition("=")[2] or value}
    return {spelling for secret in found if secret for spelling in (secret, unquote(secret))}


def _head_and_tail(rest: str) -> tuple[str, str]:
    """What stands before the query string or fragment, and those."""
    end = min((rest.find(mark) for mark in "?#" if mark in rest), default=len(rest))
    return rest[:end], rest[end:]


def _shown_url(scheme: str, rest: str) -> str:
    """A URL without credentials, query string and fragment; where it is not certain what is a password, with less."""
    head, tail = _head_and_tail(rest)
    users, at, after = head.rpartition("@")
    authority = (users if at else head).partition("/")[0]
    if at:
        if "/" not in users or ":" in authority or "@" in authority:
            return scheme + after
        stored = scheme.lower() in _STORES and ":" not in users
        return scheme + (head if stored else f"{_HIDDEN}@{after}")
    host, colon, port = authority.rpartition(":") if not authority.endswith("]") else (authority, "", "")
    strange = colon and not _PORT.fullmatch(port)
    # A password with a question mark: what looks like a query string has the host.
    if strange or ("@" in tail and ("/" not in head or (colon and not _HOST.fullmatch(host)))):
        return scheme + _HIDDEN
    return scheme + head


def _shown_pipe(command: str) -> str:
    """The program's name, and the last word that names a file; the environment and all options stay hidden."""
    words = _words(command)
    program = next((word for word in words if not _ASSIGNMENT.fullmatch(word)), "")
    files = [file for word in words if word is not program and (file := _file_in(word))]
    shown = [program if _COMMAND.fullmatch(program) else "", _HIDDEN, *files[-1:]]
    return "pipe:" + " ".join(word for word in shown if word)


def _file_in(word: str) -> str:
    """A word's URL or tar as it is shown, "" where there is none."""
    if match := _URL.search(word):
        return _shown_url(match["scheme"], match["rest"])
    if ".tar" not in word:
        return ""
    return word if _FILE.fullmatch(word) else (_FILE.fullmatch(re.split(r"[/=:@?]", word)[-1]) or [""])[0]


def _words(command: str) -> list[str]:
    """A shell command's words without their quotes, also of commands in quotes; as far as they can be told apart."""
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.replace('"', " ").replace("'", " ").split()
    found: list[str] = []
    for word in words:
        inner = word.strip("();&|")
        found += re.split(r"[\s;|&()]+", inner) if re.search(r"\s.*\.tar|\s.*://|[;|&]", inner) else [inner]
    return [word for word in found if word]


def _of_environment() -> set[str]:
    return {value for name, value in os.environ.items() if len(value) >= 8 and _TELLING_VARIABLE.fullmatch(name)}
