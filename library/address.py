"""Addresses of data that are no local files: a URL or a `pipe:` command, with braces for several shards."""

import re
from pathlib import Path

from library.errors import InputError

_SCHEME = re.compile(r"pipe:|[A-Za-z][A-Za-z0-9+.-]+://")
_URL = re.compile(r"(?P<scheme>[A-Za-z][\w+.-]*://)(?:[^/@\s'\"]*@)?(?P<rest>[^?#\s'\"]*)[^\s'\"]*")


class Address:
    """The text of an address; shown without credentials and query strings, which often hold keys."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __str__(self) -> str:
        return shown(self.text)

    def __repr__(self) -> str:
        return f"Address({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Address) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)

    def shards(self, flag: str) -> list[str]:
        """The address of each shard: braces such as {00000..00999} and {a,b} expanded, separately between `::`.

        Raises:
            InputError: the braces are malformed; the message names the flag.
        """
        from webdataset.shardlists import expand_urls

        try:
            return expand_urls(self.text)
        except (ValueError, AssertionError) as error:
            raise InputError(f"{flag} {self}: cannot be expanded ({error})") from error


def shown(address: str) -> str:
    """The address for messages, without credentials and query string."""
    if not address.startswith("pipe:"):
        return _URL.sub(lambda match: match["scheme"] + match["rest"], address)
    words = address.removeprefix("pipe:").split()
    files = [shown(word.strip("'\"")) for word in words[1:] if "://" in word or ".tar" in word]
    return f"pipe:{' '.join(words[:1])} … {' '.join(files[-1:])}".rstrip()


def location(text: str) -> Path | Address:
    """Convert a command-line value: an `Address` if it is spelt as an address, else a path."""
    return Address(text) if _SCHEME.match(text) else Path(text)
