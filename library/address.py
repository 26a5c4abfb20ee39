"""Addresses of data that are no local files: a URL or a `pipe:` command, with braces for several shards."""

import re
from pathlib import Path

from library.errors import InputError
from library.redaction import remember, shown_address

_IPV6 = re.compile(r"\[[0-9A-Fa-f:.]*(%\w+)?\]")
_COLONS = "\0"  # no address has it
_SCHEME = re.compile(r"pipe:|[A-Za-z][A-Za-z0-9+.-]+://")


class Address:
    """The text of an address; shown without credentials and query strings, which often hold keys."""

    def __init__(self, text: str) -> None:
        self.text = text
        remember(text)

    def __str__(self) -> str:
        return shown_address(self.text)

    def __repr__(self) -> str:
        return f"Address({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Address) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)

    def shards(self, flag: str) -> list[str]:
        """The address of each shard: braces such as {00000..00999} and {a,b} expanded, separately between `::`.

        The two colons of an IPv6 address in brackets are its own.

        Raises:
            InputError: the braces are malformed; the message names the flag.
        """
        from webdataset.shardlists import expand_urls

        try:
            kept = _IPV6.sub(lambda match: match[0].replace("::", _COLONS), self.text)
            return [shard.replace(_COLONS, "::") for shard in expand_urls(kept)]
        except (ValueError, AssertionError) as error:  # their texts quote the address, or the environment
            reason = "its braces do not match: close each { with a }"
            if isinstance(error, AssertionError):
                reason = "it has a ${NAME}, and the environment has no WDS_NAME"
            raise InputError(f"{flag} {self}: cannot be expanded: {reason}") from None


def user_path(text: str) -> Path:
    """A path as a user writes it: a leading ~ is the home folder, also where no shell has replaced it (--flag=~/x)."""
    path = Path(text)
    try:
        return path.expanduser()
    except RuntimeError:  # there is no such home
        return path


def location(text: str) -> Path | Address:
    """Convert a command-line value: an `Address` if it is spelt as an address, else a path.

    A spelling that only a path has (./data/laion, data/laion/) would be lost in a `Path`, and data/laion may be a
    repository's name on the hub: such a path becomes an absolute one.
    """
    if _SCHEME.match(text):
        return Address(text)
    path = user_path(text)
    looks_like_name = path.as_posix().count("/") == 1 and path.as_posix() != text
    return path.absolute() if looks_like_name else path
