"""The documents and the list of public addresses say what the code says."""

import argparse
import ast
import re
import shlex
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import sdxl_pretrain
from library.data.cache import locations
from library.data.index import kept_tables
from library.options.command_line import read_command_line
from library.options.refused import REFUSED
from tools import write_flag_docs

ROOT = Path(__file__).resolve().parents[1]
STATEMENT = "public_address_statement.md"
READMES = ("README.md", "README-zh.md")
COMMANDS = ("bash test/pretrain_full_1m_1p_sdxl.sh --demo", "bash test/run_tests.sh")
LAUNCHERS = ("pretrain_full_1m_1p_sdxl.sh", "pretrain_full_1m_8p_sdxl.sh", "pretrain_full_nm_np_sdxl.sh")
MOST_BYTES = 12 * 1024  # of a README
# Pages that are in both languages, and those of developers and measurements, which are in English only.
SUBJECTS = (
    "running", "many_machines", "data", "captions_and_crops", "caches", "streaming", "bad_samples", "training",
    "memory", "resuming", "output_files", "exactness", "sd_scripts", "fine_tuning", "ascend",
)  # fmt: skip
PAIRS = (READMES, *((f"docs/{name}.md", f"docs/zh/{name}.md") for name in SUBJECTS))
ENGLISH_ONLY = (
    "CONTRIBUTING.md", "docs/architecture.md", "docs/scaling.md", "docs/emoji-laion.md", "third_patch/README.md",
    "tools/demo/README.md", "test/npu_sim/README.md", "public_address_statement.md",
)  # fmt: skip
LINKED = (*ENGLISH_ONLY, "docs/flags/sdxl_pretrain.md")  # that page leads to its neighbours' folder
NOT_THERE = {"docs/sd_scripts.md": "Not there yet", "docs/zh/sd_scripts.md": "尚缺的部分"}  # flags that are missing
OTHER_COMMANDS = {"--all", "--demo", "--help", "--without", "--shm-size"}  # of run_tests.sh, launchers, docker
# Lines that call other scripts, whose flags are their own.
OTHER_SCRIPTS = re.compile(r"(tools/demo|bench|test/npu_sim|accelerate|docker|pytest)\b.*--|--out\b|--write\b")
SCRIPTS = {script.name: script for script in write_flag_docs.scripts()}
CHANGES = "What 14 changes touch"
PROMPT_OPTIONS = {"--w", "--h", "--d", "--s", "--l", "--n", "--ss"}
CONTACTED = "Contacted without standing in the code / 未写在代码中但会访问的地址"
REQUIRED, OFF, NOTHING = {"required", "必填"}, {"off", "关"}, {"—"}

URL = re.compile(r"""\b(?:https?|ssh|git|ftp|s3|gs|git\+https)://[^\s"'`<>()\[\]\\]+""")
WITHOUT_SCHEME = re.compile(
    r"(?<![\w./-])(?:www\.|(?:github|gitee|gitlab|huggingface|modelscope|hf)\.(?:com|co|cn)/)[\w./~-]+"
)
EMAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)*\.[a-z]{2,}\b")
# A hub name looks like a path. But it is no part of a longer one, and its name has a hyphen or its owner is known.
OWNER_NAME = re.compile(r"(?<![\w./$}{-])([A-Za-z0-9][\w-]*)/([A-Za-z0-9][\w.-]*\w)(?![\w/{$-])")
KNOWN_OWNERS = {"stabilityai", "madebyollin", "openai", "laion", "runwayml", "huggingface", "google", "facebook"}
NO_HUB_NAME = re.compile(r".*\.(py|sh|txt|json|jsonl|toml|tar|parquet|png|jpg|npz|log|safetensors|ckpt|bin)$")
LOCAL_HOSTS = re.compile(
    r"(localhost|127\.|0\.0\.0\.0|\[?::1|.*\.?example\.(com|org|net)$|.*\.(invalid|test|example)$)"
)
MADE_UP_OWNERS = {"owner", "no", "tiny", "some", "nowhere", "nobody", "no-such"}


def tracked(*patterns):
    """Files of the repository, new ones that git does not ignore among them."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return sorted({name for name in listed.stdout.splitlines() if (ROOT / name).is_file()})


DOCUMENTS = (*(page for pair in PAIRS for page in pair), *ENGLISH_ONLY, *tracked("docs/flags/*.md"))
PAGES = (*DOCUMENTS, *tracked("docs/measurements/*.md"))


def code_files():
    """All that is not a document: code, scripts, requirements, settings."""
    for name in tracked():
        if name.endswith(".md") or name == "LICENSE" or name.startswith("docs/") or name == "test/test_documents.py":
            continue
        try:
            yield name, (ROOT / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # pictures, weights


def addresses(text):
    """Every public address in a text: URLs, hosts of code and models without a scheme, e-mail addresses, hub names."""
    found = {url.rstrip(".,;:") for url in URL.findall(text)}
    found = {url for url in found if (host := urlsplit(url).netloc) and "{" not in host and "$" not in host}
    found = {url for url in found if not LOCAL_HOSTS.match(urlsplit(url).netloc)}
    rest = URL.sub(" ", text)
    found |= {address.rstrip(".") for address in WITHOUT_SCHEME.findall(rest)}
    rest = WITHOUT_SCHEME.sub(" ", rest)
    found |= {mail for mail in EMAIL.findall(rest) if not LOCAL_HOSTS.match(mail.partition("@")[2])}
    for owner, name in OWNER_NAME.findall(EMAIL.sub(" ", rest)):
        is_path = (ROOT / owner).exists() or NO_HUB_NAME.match(name) or owner in MADE_UP_OWNERS
        looks_like_one = owner in KNOWN_OWNERS or (re.search(r"[A-Za-z]", owner) and "-" in name)
        if looks_like_one and not is_path:
            found.add(f"{owner}/{name}")
    return found


def table_rows(text):
    """The cells of every table row, header rows and rules left out; an escaped bar belongs to its cell."""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        below = lines[number + 1] if number + 1 < len(lines) else ""
        if line.startswith("|") and not re.match(r"\|\s*:?-+", line) and not re.match(r"\|\s*:?-+", below):
            yield number, [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def code_spans(cell):
    return re.findall(r"`([^`]+)`", cell)


def section(text, title):
    """What stands under a heading, up to the next of its level or above."""
    match = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^#{{1,2}} |\Z)", text, re.DOTALL | re.MULTILINE)
    assert match, f"no heading {title!r}"
    return match[2]


def flag_tables(text):
    """The tables of flags, in order: each a list of (flags, default cell, meaning cell)."""
    tables, last = [], None
    for number, cells in table_rows(text):
        if len(cells) == 3 and cells[0].startswith("`--") and code_spans(cells[0])[0] not in PROMPT_OPTIONS:
            if last is None or number != last + 1:
                tables.append([])
            tables[-1].append((code_spans(cells[0]), cells[1], cells[2]))
            last = number
    return tables


def flag_groups(parser):
    """The flags of --help, section by section."""
    groups = [
        [action for action in group._group_actions if action.dest != "help" and action.help != argparse.SUPPRESS]
        for group in parser._action_groups
    ]
    return [group for group in groups if group]


def default_is_told(flag, cell):
    if flag.required:
        return cell in REQUIRED
    if flag.kind.switch:
        return cell in OFF
    if flag.default in (None, (), ""):
        return cell in NOTHING
    return cell == f"`{flag.default}`"


def bash_blocks(text):
    return re.findall(r"^```bash\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def script_flags():
    actions = [action for script in SCRIPTS.values() for action in script.parser()._actions]
    return {flag for action in actions if action.help != argparse.SUPPRESS for flag in action.option_strings}


def launcher_defaults(launcher):
    shown = subprocess.run(
        ["bash", f"test/{launcher}", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return dict(re.findall(r"^  --(\w+)=(.*)$", shown, re.MULTILINE))


def without_blocks(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def prose_spans(text):
    return code_spans(without_blocks(text))


def anchors(text):
    """The names by which links reach a page's headings, as GitHub makes them; code blocks have no headings."""
    titles = re.findall(r"^#+ (.*)$", without_blocks(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def mapped_names(docstring):
    """The files and packages that a package's docstring has a line for: names, two spaces or more, their purpose."""
    lines = re.findall(r"^ *([\w/]+(?:, [\w/]+)*) {2,}\S", docstring, re.MULTILINE)
    return [name for line in lines for name in line.split(", ")]


def test_addresses_are_found_in_code_and_made_up_ones_are_not():
    text = """
    url = "https://a-host.com/page?x=1"  # see (http://b.org/c.pdf), git+https://github.com/x/y.git.
    ssh://git@gitee.com/z  mail: some.one@a-company.cn  model="runwayml/sd"  vae=me-and-you/vae-fix
    http://localhost:80/x http://127.0.0.1/x https://example.com/x f"http://{host}/x" a@example.org  test/run-me
    shards/00000.tar  /usr/local/some-thing  1/10000 "$out/the-model" owner/the-name  @pytest.mark.skip  img/s
    """
    assert addresses(text) == {
        "https://a-host.com/page?x=1", "http://b.org/c.pdf", "git+https://github.com/x/y.git", "ssh://git@gitee.com/z",
        "some.one@a-company.cn", "runwayml/sd", "me-and-you/vae-fix",
    }  # fmt: skip


def test_every_public_address_in_the_code_is_stated_with_its_files():
    statement = (ROOT / STATEMENT).read_text(encoding="utf-8")
    stated = {}
    for _, cells in table_rows(statement):
        for address in code_spans(cells[0]):
            stated.setdefault(address, []).extend(code_spans(cells[1]))
    missing = []
    for name, text in code_files():
        for address in sorted(addresses(text)):
            files = stated.get(address)
            if files is None:
                missing.append(f"{address} ({name}) has no row")
            elif not any(name == file or (file.endswith("/") and name.startswith(file)) for file in files):
                missing.append(f"the row of {address} does not name {name}")
    assert not missing, f"{STATEMENT}: " + "; ".join(missing)


def test_every_public_address_in_the_documents_is_stated():
    statement = read(STATEMENT)
    stated = {address for _, cells in table_rows(statement) for address in code_spans(cells[0])}
    links = {(url.rstrip(".,;:"), name) for name in DOCUMENTS if name != STATEMENT for url in URL.findall(read(name))}
    made_up = re.compile(rf"{LOCAL_HOSTS.pattern}|host$|bucket$")
    real = {(url, name) for url, name in links if not made_up.match(urlsplit(url).netloc)}
    assert sorted((url, name) for url, name in real if url not in stated) == []


def test_no_stated_address_is_out_of_date():
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in (*dict(code_files()), *DOCUMENTS, "LICENSE")}
    statement = (ROOT / STATEMENT).read_text(encoding="utf-8")
    in_files = statement.replace(section(statement, CONTACTED), "")
    stale = []
    for _, cells in table_rows(in_files):
        for address in code_spans(cells[0]):
            for file in code_spans(cells[1]):
                inside = [
                    text for name, text in texts.items() if name == file or (file[-1] == "/" and name.startswith(file))
                ]
                if not any(address in text for text in inside):
                    stale.append(f"{address} does not stand in {file}")
    assert not stale, f"{STATEMENT}: " + "; ".join(stale)


def test_the_readmes_are_short():
    assert {name: len(read(name).encode()) for name in READMES if len(read(name).encode()) > MOST_BYTES} == {}


@pytest.mark.parametrize("language", [0, 1], ids=READMES)
def test_the_folders_beside_the_data_have_the_codes_names(language):
    pages = "".join(read(f"docs/{['', 'zh/'][language]}{name}.md") for name in ("data", "caches"))
    for name in (kept_tables._FOLDER, locations._FOLDER):
        assert f"`{name}`" in pages
    assert set(re.findall(r"`(\.[a-z_]+_(?:index|cache))`", pages)) == {kept_tables._FOLDER, locations._FOLDER}


def test_every_page_is_known_here_and_linked_from_the_readme_of_its_language():
    pages = {page for page in tracked("*.md") if not page.startswith("docs/measurements/")}
    assert pages == set(DOCUMENTS)
    for number, name in enumerate(READMES):
        linked = {target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", read(name))}
        lacking = {pair[number] for pair in PAIRS} | set(LINKED) - {name}
        assert not lacking - linked - {name}, f"{name} does not link to {sorted(lacking - linked - {name})}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_page_of_flags_is_what_the_flags_say(name):
    script = SCRIPTS[name]
    written = write_flag_docs.page_of(script).read_text(encoding="utf-8")
    assert written == write_flag_docs.page(script), "run `python tools/write_flag_docs.py`"
    assert {path.stem for path in write_flag_docs.PAGES.iterdir()} == {Path(name).stem for name in SCRIPTS}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_tables_hold_every_flag_with_its_default_in_the_groups_of_help(name):
    script = SCRIPTS[name]
    text = write_flag_docs.page_of(script).read_text(encoding="utf-8").partition("## Keys of")[0]
    groups, tables = flag_groups(script.parser()), flag_tables(text)
    flags_of = [{flag for action in group for flag in action.option_strings} for group in groups]
    told = [{flag for flags, _, _ in table for flag in flags} for table in tables]
    known, tabled = set().union(*flags_of), set().union(*told)
    assert not known - tabled, f"{name}: the tables lack {sorted(known - tabled)}"
    assert not tabled - known, f"{name}: the script does not take {sorted(tabled - known)}"
    assert told == flags_of, f"{name}: the tables are not grouped as --help is"
    wrong = []
    for action in (action for group in groups for action in group):
        row = next(row for table in tables for row in table if action.option_strings[0] in row[0])
        flag = script.flags.by_key.get(action.option_strings[0].removeprefix("--"))
        if set(row[0]) != set(action.option_strings):
            wrong.append(f"spellings of {action.option_strings[0]} are {action.option_strings}")
        if flag is None:  # a shorthand
            assert action.nargs == 0 and row[1] in OFF
            continue
        if not default_is_told(flag, row[1]):
            wrong.append(f"default of {row[0][0]} is {flag.default!r}, not {row[1]}")
        unnamed = [str(choice) for choice in flag.kind.choices if f"`{choice}`" not in row[2]]
        if unnamed:
            wrong.append(f"{row[0][0]} does not name its choices {unnamed}")
    assert not wrong, f"{name}: " + "; ".join(wrong)


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("language", [0, 1], ids=READMES)
def test_the_launchers_arguments_are_told_with_their_defaults(language, launcher):
    text = "\n".join(read(pair[language]) for pair in PAIRS)
    defaults = launcher_defaults(launcher)
    told = {
        cells[0].strip("`"): cells[1].strip("`") for _, cells in table_rows(text) if cells[0].strip("`") in defaults
    }
    assert defaults, "the launcher's --help names no argument"
    if launcher == LAUNCHERS[-1]:  # its own number of epochs stands beside the table
        epochs = defaults.pop("max_train_epoch")
        assert told.pop("max_train_epoch") != epochs
        assert re.search(rf"\b{epochs} (epochs \(|轮（)`max_train_epoch`", text)
    assert told == defaults


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_flag_in_the_text_is_one_that_something_takes(name):
    text = read(name)
    known = script_flags() | PROMPT_OPTIONS | OTHER_COMMANDS
    known |= {f"--{argument}" for launcher in LAUNCHERS for argument in launcher_defaults(launcher)}
    missing = set()
    if name in NOT_THERE:
        told = section(text, NOT_THERE[name])
        missing = {flag for span in code_spans(told) for flag in re.findall(r"--\w+", span)}
        assert missing and not missing & known, f"{name} says that {sorted(missing & known)} are missing"
    spans = [*prose_spans(text), *bash_blocks(text)]
    named = set()
    for span in spans:
        # What follows another script's name, or stands in a line that calls one, is that script's own.
        lines = [line for line in span.replace("\\\n", " ").splitlines() if not OTHER_SCRIPTS.search(line)]
        named |= {flag for line in lines for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", line)}
    named -= {f"--{refused}" for refused in REFUSED}  # which say what to use
    assert not named - known - missing, f"{name} names {sorted(named - known - missing)}, which nothing takes"


def test_the_repository_map_is_the_repository():
    text = read("docs/architecture.md")
    paths = [path for _, cells in table_rows(section(text, "Repository map")) for path in code_spans(cells[0])]
    absent = [path for path in paths if not (ROOT / path).exists()]
    files = [file for file in tracked("*.py", "*.sh", "bench", "docs") if Path(file).name != "__init__.py"]
    files = [file for file in files if file not in SCRIPTS]  # which docs/flags/ has a page for
    left_out = [file for file in files if not any(file == path or file.startswith(path) for path in paths)]
    packages = {f"{Path(file).parent}/" for file in tracked("library/*/__init__.py")}
    assert (absent, left_out, packages - set(paths)) == ([], [], set())


@pytest.mark.parametrize("package", [str(Path(file).parent) for file in tracked("library/*__init__.py")])
def test_every_package_has_a_line_for_each_of_its_files(package):
    docstring = ast.get_docstring(ast.parse(read(f"{package}/__init__.py"))) or ""
    files = {Path(file).relative_to(package) for file in tracked(f"{package}/*.py")} - {Path("__init__.py")}
    there = {file.stem if len(file.parts) == 1 else f"{file.parts[0]}/" for file in files}
    named = mapped_names(docstring)
    assert sorted(named) == sorted(there), f"{package}/__init__.py, the map of that package"


@pytest.mark.parametrize("name", PAGES)
def test_the_files_that_a_page_names_exist(name):
    text = read(name)
    if name == "docs/architecture.md":  # the column of a commit that is past names files that have moved
        changes = section(text, CHANGES)
        text = text.replace(changes, "\n".join(cells[-1] for _, cells in table_rows(changes)))
    paths = set(re.findall(r"(?<![\w/.-])((?:library|third_patch|test|tools|bench)/[\w./-]*\w)", text))
    absent = [path for path in sorted(paths) if not (ROOT / path).exists() and not path.startswith("test/output")]
    assert not absent, f"{name}: {absent}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_are_right(name):
    for line in "\n".join(bash_blocks(read(name))).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        scripts = [word for word in words if word.endswith((".sh", ".py"))]
        absent = [word for word in scripts if not (ROOT / word).exists()]
        assert not absent, f"{name}: no such script in: {line}"
        for script in SCRIPTS.keys() & set(words):
            assert not read_command_line(SCRIPTS[script].flags, words[words.index(script) + 1 :]).problems
        if words and words[0] == "...":  # flags that are added to a command
            assert not read_command_line(sdxl_pretrain.SCRIPT.flags, words[1:]).problems
        end = words.index("--") if "--" in words else len(words)
        if words[end:]:  # flags that a launcher passes on to the script
            assert not read_command_line(sdxl_pretrain.SCRIPT.flags, words[end + 1 :]).problems
        given = {word[2:].partition("=")[0] for word in words[:end] if re.match(r"--\w+=", word)} - {"without"}
        for launcher in [Path(word).name for word in scripts if Path(word).name in LAUNCHERS]:
            assert given <= set(launcher_defaults(launcher)), f"{name}: {launcher} does not take all of: {line}"


@pytest.mark.parametrize("language", [0, 1], ids=READMES)
def test_the_two_commands_and_training_by_hand_are_shown(language):
    blocks = bash_blocks(read(READMES[language]))
    for command in COMMANDS:
        assert any(command in block.splitlines() for block in blocks), f"{READMES[language]} does not show: {command}"
    shown = "\n".join(block for pair in PAIRS for block in bash_blocks(read(pair[language])))
    assert len(re.findall(r"^\S*python sdxl_pretrain\.py", shown, re.MULTILINE)) >= 3


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    text, dead = read(name), []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        if "://" in target:
            continue
        if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            dead.append(target)
    assert not dead, f"{name}: {dead}"


@pytest.mark.parametrize("english, chinese", PAIRS)
def test_both_languages_show_the_same_commands_and_tables(english, chinese):
    english, chinese = read(english), read(chinese)
    assert bash_blocks(english) == bash_blocks(chinese)
    first_cells = [[code_spans(cells[0]) for _, cells in table_rows(text)] for text in (english, chinese)]
    assert first_cells[0] == first_cells[1]
    levels = [re.findall(r"^(#+) ", text, re.MULTILINE) for text in (english, chinese)]
    assert levels[0] == levels[1]


@pytest.mark.parametrize("language", [0, 1], ids=READMES)
def test_the_memory_of_the_readme_is_the_measurements(language):
    """Each row of the README's table is a row of docs/measurements/memory.md, rounded."""
    rows = {
        cells[0]: float(cells[-1]) for _, cells in table_rows(read("docs/measurements/memory.md")) if len(cells) == 8
    }
    shown = [cells for _, cells in table_rows(read(READMES[language])) if re.fullmatch(r"\d+\.\d", cells[1])]
    shown = [cells for cells in shown if cells[0].startswith("Ada")]
    assert len(shown) >= 8
    for setting, peak in shown:
        flags = {flag.removeprefix("--") for flag in code_spans(setting)} | {"gradient_checkpointing"}
        kind = re.match(r"\w+", setting)[0]
        wanted = {f"{kind}", *(flag.replace("=", " ") for flag in flags)}
        wanted = {"full_bf16 (stochastic)" if flag == "full_bf16" else flag for flag in wanted}
        wanted = {f"{flag.removeprefix('sharding ')} over 8" if "sharding" in flag else flag for flag in wanted}
        peaks = [
            value for name, value in rows.items() if set(name.removeprefix("1024 px, bf16: ").split(", ")) == wanted
        ]
        assert [f"{value:.1f}" for value in peaks] == [peak], f"{setting}: {peaks}"
