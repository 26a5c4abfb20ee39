"""Nothing secret of an address, a command or the environment is in a text that a run shows."""

import pytest

from library import redaction
from library.address import Address
from library.errors import InputError, TrainingError
from library.redaction import redacted, secrets_of, shown_address

# Address: (what is shown of it, what may be nowhere else)
URLS = {
    "HTTPS//host.test/a/{0..9}.tar": ("HTTPS//host.test/a/{0..9}.tar", set()),
    "HTTPS//me:passwd@host.test/a.tar?sig=x1y2z3": ("HTTPS//host.test/a.tar", {"passwd", "x1y2z3"}),
    "HTTPS//user:p@ss/word@host.test/a.tar": ("HTTPS//host.test/a.tar", {"p@ss/word", "word"}),
    "HTTPS//user:pa/ssword@host.test/a.tar": ("HTTPS//host.test/a.tar", {"pa/ssword", "ssword"}),
    "HTTPS//user:1234/ssword@host.test/a.tar": ("HTTPS//host.test/a.tar", {"1234/ssword", "1234", "ssword"}),
    "HTTPS//user:pass?word@host.test/a.tar": ("HTTPS//…", {"pass", "pass?word"}),
    "HTTPS//user:p%40ssword@host.test/a.tar": ("HTTPS//host.test/a.tar", {"p%40ssword", "p@ssword"}),
    "HTTPS//token99@host.test/a.tar": ("HTTPS//host.test/a.tar", {"token99"}),
    "HTTPS//host.test/data@v1/a.tar": ("HTTPS//…@v1/a.tar", set()),
    "HTTPS//host.test:8000/a.tar?mail=me@home": ("HTTPS//host.test:8000/a.tar", {"me@home"}),
    "HTTPS//host.test/a.tar?X-Amz-Credential=AKIA%2F1&X-Amz-Signature=5eaf00d#part": (
        "HTTPS//host.test/a.tar", {"AKIA%2F1", "AKIA/1", "5eaf00d#part"},
    ),
    "HTTPS//u:passwd@[::1]:80/{0..3}.tar": ("HTTPS//[::1]:80/{0..3}.tar", {"passwd"}),
    "HTTPS//host.test:{80..83}/a.tar": ("HTTPS//host.test:{80..83}/a.tar", set()),
    "S3//bucket/x@y/a.tar": ("S3//bucket/x@y/a.tar", set()),
    "S3//AKIA:SEC/RET@bucket/a.tar": ("S3//bucket/a.tar", {"SEC/RET"}),
    "simplecache::HTTPS//u:passwd@host.test/a.tar": ("simplecache::HTTPS//host.test/a.tar", {"passwd"}),
}  # fmt: skip
PIPES = {
    "KEY=s3cr3t aws s3 cp S3//b/{0..9}.tar -": ("aws … S3//b/{0..9}.tar", {"s3cr3t"}),
    "env A='two words' B=s3cr3t aws s3 cp S3//b/0.tar -": ("env … S3//b/0.tar", {"two words", "s3cr3t"}),
    "export KEY=s3cr3t; aws s3 cp S3//b/0.tar -": ("export … S3//b/0.tar", {"s3cr3t"}),
    "bash -c 'KEY=s3cr3t aws s3 cp S3//b/0.tar -'": ("bash … S3//b/0.tar", {"s3cr3t"}),
    "(KEY=s3cr3t cat x/0.tar)": ("cat … x/0.tar", {"s3cr3t"}),
    "KEY=s3cr3t' cat 0.tar": ("cat … 0.tar", {"s3cr3t"}),
    "curl -s -u me:s3cr3t HTTPS//h.test/0.tar | cat": ("curl … HTTPS//h.test/0.tar", {"s3cr3t", "me:s3cr3t"}),
    "curl -H 'Authorization: Bearer s3cr3t' HTTPS//me:pw99@h.test/0.tar?sig=5eaf00d": (
        "curl … HTTPS//h.test/0.tar", {"s3cr3t", "pw99", "5eaf00d"},
    ),
    "./get --token=s3cr3t --url=HTTPS//h.test/0.tar": ("./get … HTTPS//h.test/0.tar", {"s3cr3t"}),
    "sshpass -p s3cr3t scp me@h:/data/0.tar /dev/stdout": ("sshpass … 0.tar", {"s3cr3t"}),
    "cat /data/{0..9}.tar": ("cat … /data/{0..9}.tar", set()),
}  # fmt: skip
ALL = [*URLS.items(), *((f"pipe:{text}", (f"pipe:{shown}", hidden)) for text, (shown, hidden) in PIPES.items())]


def spelt(text):
    """With the schemes as they are written: made-up addresses of hosts like `b` are no public ones."""
    return text.replace("HTTPS//", "https:" + "//").replace("S3//", "s3:" + "//")


@pytest.mark.parametrize(("address", "expected"), ALL)
def test_an_address_is_shown_without_what_is_secret_in_it(address, expected):
    address, shown, hidden = spelt(address), spelt(expected[0]), set(map(spelt, expected[1]))
    assert str(Address(address)) == shown_address(address) == shown
    assert hidden <= secrets_of(address)
    for text in (repr(Address(address)), f"cannot read {address!r}: no", *map(str, errors(address))):
        assert not [secret for secret in hidden if secret in redacted(text, secrets_of(address))], text


def errors(address):
    """Errors that quote an address that was given on the command line."""
    redaction.remember_all({"image_dir": [address]})
    return InputError(f"{address}: no"), TrainingError(f"{address} has no end")


def test_what_an_error_of_another_library_quotes_is_hidden():
    address = spelt("HTTPS//user:pa/ssword@host.test/a.tar")
    assert redacted("nonnumeric port: 'pa/ssword'", secrets_of(address)) == "nonnumeric port: '…'"


def test_the_name_of_a_header_in_several_words_is_no_secret():
    quoted = 'curl -H"X-Auth: sesame HTTPS//h.test/0.tar'  # a quote is missing, and the shell says so
    assert redacted(f"sh: `{quoted}'", secrets_of(f"pipe:{quoted}")).startswith('sh: `curl -H"X-Auth: … ')


def test_tokens_of_the_environment_are_hidden(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    assert str(InputError("401 for hf_abcdefgh, wJalrXUtnFEMI")) == "401 for …, …"


def test_other_texts_stay_as_they_are():
    for text in ("a: b = c@d/e.tar, 3 % of 'x'", "/data/a@b/0.tar:key", "see HTTPS//host.test/docs/a.md for more"):
        assert redacted(spelt(text)) == spelt(text)


@pytest.fixture
def nothing_known(monkeypatch):
    monkeypatch.setattr(redaction, "_known", set())


@pytest.mark.usefixtures("nothing_known")
@pytest.mark.parametrize(
    "address",
    [
        "pipe:aws --profile=training s3 cp S3//training/0.tar -",
        "pipe:REGION=training mkdir -p training; cat training/0.tar",
        "pipe:curl -H 'Accept: training' -u training HTTPS//h.test/0.tar?version=training",
        "HTTPS//training@h.test/0.tar?training",
    ],
)
def test_what_need_not_be_a_secret_is_a_word_in_other_texts(address):
    redaction.remember(spelt(address))
    assert redacted("training: the state is saved") == "training: the state is saved"


@pytest.mark.usefixtures("nothing_known")
@pytest.mark.parametrize(
    ("address", "secret"),
    [
        ("pipe:aws --secret-key=sesame s3 cp S3//b/0.tar -", "sesame"),
        ("pipe:aws --secret-key sesame s3 cp S3//b/0.tar -", "sesame"),
        ("pipe:DB_PASS=sesame cat 0.tar", "sesame"),
        ("pipe:sshpass -p sesame ssh h.test cat 0.tar", "sesame"),
        ("pipe:curl -H 'X-Auth: sesame' HTTPS//h.test/0.tar", "sesame"),
        ("pipe:curl -u me:sesame HTTPS//h.test/0.tar", "sesame"),
        ("pipe:curl -ume:sesame HTTPS//h.test/0.tar", "sesame"),
        ("pipe:curl -sSLu me:sesame HTTPS//h.test/0.tar", "sesame"),
        ("pipe:curl -sH'Authorization: Bearer sesame' HTTPS//h.test/0.tar", "sesame"),
        ('pipe:curl -s -H"Authorization: Bearer sesame HTTPS//h.test/0.tar', "sesame"),  # a quote is missing
        ("pipe:wget --header='X-Auth: sesame' HTTPS//h.test/0.tar", "sesame"),
        ("pipe:sshpass -psesame ssh h.test cat 0.tar", "-psesame"),
        ("pipe:cat --with=abcdef123456 0.tar", "abcdef123456"),
        ("HTTPS//me:sesame@h.test/0.tar", "sesame"),
        ("HTTPS//h.test/0.tar?sig=sesame", "sesame"),
        ("HTTPS//h.test/0.tar?x=abcdef123456", "abcdef123456"),
        ("HTTPS//token99@h.test/0.tar", "token99"),
    ],
)
def test_what_its_name_its_place_or_its_look_tells_is_hidden_everywhere(address, secret):
    redaction.remember(spelt(address))
    for text in (f"no {secret}", f"x%20{secret}%20y", f"({secret})", f"a_{secret}\n", rf"\n{secret}"):
        assert secret not in redacted(text)
    assert redacted("the sesames stay") == "the sesames stay"


@pytest.mark.usefixtures("nothing_known")
@pytest.mark.parametrize("braces", ["{0..1", "0..1}", "${NO_SUCH_NAME}"])
def test_an_address_that_cannot_be_expanded_is_not_quoted(braces):
    address = f'pipe:get --x \'sesame\' -s -H"Authorization: Bearer sesame" "HTTPS//h.test/{braces}.tar"'
    with pytest.raises(InputError, match=r"--train_data_dir pipe:get … .*cannot be expanded: it") as raised:
        Address(spelt(address)).shards("--train_data_dir")
    assert "sesame" not in str(raised.value) and raised.value.__cause__ is None
