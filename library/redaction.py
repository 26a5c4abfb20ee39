"""Texts without secrets: credentials and query strings of addresses, keys in a pipe's command, tokens.

Whatever a run prints or writes goes through `redacted`: the messages of its errors do so when they are made, its log
and its tracebacks when they are shown. `secrets_of` says what of one address is secret, for errors of other libraries,
which quote parts of addresses.
"""

import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from urllib.parse import unquote

_HIDDEN = "…"
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?P<rest>[^\s'\"<>]*)")
_PORT = re.compile(r"[\d{}.,]*")  # braces stand for several
_HOST = re.compile(r"localhost|\[.*|.*\..*")  # what is hardly a user's name
# Schemes without a user in them: there an @ belongs to a path.
_STORES = ("s3://", "gs://", "gcs://", "hf://", "file://")
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=.*", re.DOTALL)
_TELLING_NAME = re.compile(r"pass(w|$)|pwd|token|secret|key|auth|cookie|credential|signature|\bsig$", re.IGNORECASE)
_HEADER, _USER = ("-H", "--header"), ("-u", "--user", "-U", "--proxy-user")
# curl's -H, -u and -U behind its short options that take no value (-sSu), perhaps with the value attached (-ume:word).
_SHORT = re.compile(r"-[sSfLkgGqvNiIjJlnOpRaBZ0-6#]*([HuU])(.*)", re.DOTALL)
_LONG = re.compile(r"(--header|--user|--proxy-user)=(.*)", re.DOTALL)
_SCHEMES = ("bearer", "basic", "token")  # of an Authorization header
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
    text = addresses_redacted(text)
    for secret in sorted({*secrets, *_known, *_of_environment()}, key=len, reverse=True):
        if len(secret) >= _SHORTEST and secret in text:
            text = text.replace(secret, _HIDDEN) if _looks_random(secret) else _without_word(text, secret)
    return text


def addresses_redacted(text: str) -> str:
    """The text with its addresses as `shown_address` has them, and all else as it is."""
    return _URL.sub(lambda match: _shown_url(match["scheme"], match["rest"]), text)


def remember(address: str) -> None:
    """Keep this address's secrets out of every text that is redacted from now on.

    What may be no secret at all is an ordinary word in other texts (--profile=training, ?version=latest): of such
    values those are kept that look random.
    """
    _known.update(
        secret
        for secret, is_certain in _secrets(address)
        if len(secret) >= _SHORTEST_EVERYWHERE and (is_certain or _looks_random(secret))
    )


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
    return {secret for secret, _ in _secrets(address)}


def _secrets(address: str) -> Iterator[tuple[str, bool]]:
    """Each secret, and whether its place or its name says that it is one."""
    if address.startswith("pipe:"):
        command = address.removeprefix("pipe:")
        shown = _shown_pipe(command)
        yield from ((secret, certain) for secret, certain in _secrets_of_pipe(command) if secret not in shown)
        return
    scheme, rest = _split(address)
    if scheme.lower() not in _STORES or ":" in rest.rpartition("@")[0]:
        yield from _secrets_of_url(rest)


def _secrets_of_pipe(command: str) -> Iterator[tuple[str, bool]]:
    words = _words(command)
    for program, option, word in zip(["", "", *words], ["", *words], words, strict=False):
        if "=" not in option and option.startswith("-"):
            short = _SHORT.fullmatch(option)
            yield from _secrets_of_option(program, f"-{short[1]}" if short and not short[2] else option, word)
        yield from _secrets_of_attached(option, word)
        # A header whose quotes are missing or do not match is in several words.
        if word.lower() not in _SCHEMES and (
            option.lower() in _SCHEMES or (option.endswith(":") and _TELLING_NAME.search(option))
        ):
            yield word, True
        name, assigned, value = word.partition("=")
        if assigned and value and re.fullmatch(r"-{0,2}\w[\w-]*", name):
            yield value, bool(_TELLING_NAME.search(name))
        for match in _URL.finditer(word):
            yield from _secrets_of_url(match["rest"])


def _secrets_of_option(program: str, option: str, word: str) -> Iterator[tuple[str, bool]]:
    """Of an option of a command and the word behind it."""
    parts = [part for part in re.split(r"[:\s]+", word)[1:] if part and part.lower() not in _SCHEMES]
    if option in _HEADER and word.endswith(":"):
        return  # the name alone, of a header in several words
    if option in _HEADER:
        is_certain = bool(_TELLING_NAME.search(word.partition(":")[0]))
    elif option in _USER:
        is_certain = bool(parts)  # a name alone is no secret
    elif option == "-p":
        is_certain = program == "sshpass"
    elif _TELLING_NAME.search(option):
        is_certain = True
    else:
        return
    yield from ((one, is_certain) for one in (word, *parts))


def _secrets_of_attached(program: str, word: str) -> Iterator[tuple[str, bool]]:
    """Of an option that has its value in the same word: -ume:word, -H"Authorization: …", --header=…, sshpass -pword."""
    if program == "sshpass" and word.startswith("-p") and len(word) > 2:
        yield from ((word, True), (word[2:], True))
    elif (short := _SHORT.fullmatch(word)) and ":" in short[2]:
        yield from _secrets_of_option("", f"-{short[1]}", short[2])
    elif long := _LONG.fullmatch(word):
        yield from _secrets_of_option("", long[1], long[2])


def _split(address: str) -> tuple[str, str]:
    scheme, mark, rest = address.partition("://")
    return (scheme + mark, rest) if mark else ("", address)


def _secrets_of_url(rest: str) -> Iterator[tuple[str, bool]]:
    head, tail = _head_and_tail(rest)
    users = head.rpartition("@")[0]
    if not users and ":" in head and "@" in tail:  # a password with a question mark
        users = rest.rpartition("@")[0]
    name, _, password = users.partition(":")
    found = [(one, True) for one in (users, password, *re.split(r"[@/?#]", password))] if password else []
    if users and not password:
        found += [(one, any(map(str.isdigit, one))) for one in (users, name)]  # a token, or a user's name
    for pair in re.split(r"[&;]", tail[1:]):
        key, _, value = pair.partition("=")
        found.append((value or pair, bool(value and _TELLING_NAME.search(key))))
    for secret, is_certain in found:
        if secret:
            yield from ((spelling, is_certain) for spelling in (secret, unquote(secret)))


def _looks_random(text: str) -> bool:
    """Whether a text is hardly a word, a name or a path of somebody's."""
    return len(text) >= 12 and any(map(str.isdigit, text)) and any(map(str.isalpha, text))


def _without_word(text: str, secret: str) -> str:
    """The text without a secret that may be a part of other words; an escape such as %20 or \\n is no part of one."""
    begins = r"(?:(?<![A-Za-z0-9])|(?<=%[0-9A-Fa-f]{2})|(?<=\\[nrt]))"
    return re.sub(rf"{begins}{re.escape(secret)}(?![A-Za-z0-9])", _HIDDEN, text)


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
