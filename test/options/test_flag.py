"""A flag is written once: one that a test adds to a group is known to everything that knows flags."""

import dataclasses
import logging
import os
import re
import subprocess
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path

import pytest

import sdxl_pretrain
from library.errors import InputError
from library.options.data import DataOptions, SubsetOptions
from library.options.flag import SUBSET, Flags, OptionGroup, flag, group_types
from library.options.rules import problems_of
from library.options.saved_config import config_text
from library.options.training import TrainingOptions
from library.options.values import plain_values
from library.script import Script
from library.training.ranks.agreement import describe_options
from library.training.state.resume import log_changed_options, versions
from tools import write_flag_docs

ROOT = Path(__file__).resolve().parents[2]
REQUIRED = ["--pretrained_model_name_or_path=owner/model", "--output_dir=o"]
DATA = ["--train_data_dir=d", "--resolution=64"]


@dataclass(frozen=True, kw_only=True)
class GlowingSubset(SubsetOptions):
    title: typing.ClassVar[str] = "glow"

    glow: int = flag(0, "tags that glow", least=0, at=SUBSET, key="num_glow")


@dataclass(frozen=True, kw_only=True)
class GlowingData(DataOptions):
    subsets: tuple[GlowingSubset, ...]


@dataclass(frozen=True, kw_only=True)
class NetworkOptions(OptionGroup):
    """The group of a script of its own."""

    title: typing.ClassVar[str] = "network"

    network_dim: int | None = flag(None, "rank of the network", least=1)
    network_alpha: float = flag(1.0, "its scale times the rank", above=0, needs="network_dim")

    def check(self, options):
        if self.network_dim and options.ema.use_ema:
            yield "--network_dim and --use_ema do not go together here; leave one of them out"


@dataclass(frozen=True)
class Glowing(TrainingOptions):
    defaults: typing.ClassVar = {"learning_rate": 1e-4}

    data: GlowingData
    network: NetworkOptions


GLOWING = Script("Glowing.\n", Glowing, families=("sd1",), recipe="made_up:train")
PLAIN = Script("Plain.\n", TrainingOptions, families=("sd1",), recipe="made_up:train")


def glowing(*words, data=DATA):
    return GLOWING.options([*REQUIRED, *data, *words])


def glow_of(options):
    return [subset.glow for subset in options.data.subsets]


class TestAddedFlag:
    def test_it_stands_on_the_command_line_and_in_help(self, capsys):
        assert glow_of(glowing("--glow=3")) == [3]
        with pytest.raises(InputError, match="--glow must be a whole number of at least 0, got '-1'"):
            glowing("--glow=-1")
        assert GLOWING.main(["--help"]) == 0
        shown = capsys.readouterr().out
        assert "glow:\n  --glow N" in shown and "tags that glow (0)" in shown and "Glowing." in shown

    def test_it_is_a_key_of_the_configuration_file_and_of_a_dataset_configuration(self, tmp_path):
        file = tmp_path / "run.toml"
        file.write_text("glow = 4\n")
        assert glow_of(glowing(f"--config_file={file}")) == [4]
        data = tmp_path / "data.toml"
        data.write_text(
            "[general]\nnum_glow = 5\n[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'a'\n"
            "[[datasets.subsets]]\nimage_dir = 'b'\nnum_glow = 6\n"
        )
        assert glow_of(glowing(f"--dataset_config={data}", data=[])) == [5, 6]
        data.write_text(data.read_text().replace("num_glow = 6", "num_glow = -6"))
        with pytest.raises(InputError, match=r"num_glow in .*must be a whole number of at least 0, got -6"):
            glowing(f"--dataset_config={data}", data=[])

    def test_it_stands_on_the_page_of_flags(self):
        page = write_flag_docs.page(GLOWING)
        assert "## Glow\n" in page and "| `--glow` | `0` | tags that glow |" in page
        assert "| `num_glow` | `--glow` |" in page
        assert "| `--network_alpha` | `1.0` | its scale times the rank. Needs `--network_dim` |" in page

    def test_a_change_of_it_is_told_when_a_run_goes_on_and_found_between_ranks(self, caplog):
        then, now = glowing("--glow=1"), glowing("--glow=2", "--network_dim=4")
        with caplog.at_level(logging.WARNING):
            saved = types.SimpleNamespace(options=plain_values(then), versions=versions())
            log_changed_options(saved, plain_values(now))
        assert "changed since the state: option glow, 1 -> 2" in caplog.text
        assert "option network_dim, None -> 4" in caplog.text
        first, second = describe_options(then), describe_options(now)
        assert {name for name in first if first[name] != second[name]} == {"--glow", "--network_dim"}

    def test_a_state_that_is_older_than_it_goes_on_without_a_word(self, caplog):
        then = {name: value for name, value in plain_values(glowing()).items() if name != "glow"}
        saved = types.SimpleNamespace(options=then, versions=versions())
        log_changed_options(saved, plain_values(glowing()), defaults=GLOWING.flags.defaults())
        assert not caplog.records
        log_changed_options(saved, plain_values(glowing("--glow=1")), defaults=GLOWING.flags.defaults())
        assert "option glow, None -> 1" in caplog.text

    def test_it_is_in_the_configuration_that_a_run_leaves(self):
        assert "\nglow = 7\n" in config_text(glowing("--glow=7"), seed=1)


class TestTwoScripts:
    def test_each_has_its_groups_and_defaults(self):
        assert glowing("--network_dim=4").network.network_dim == 4
        assert glowing().optimizer.learning_rate == 1e-4
        assert PLAIN.options([*REQUIRED, *DATA]).optimizer.learning_rate == 2e-6
        with pytest.raises(InputError, match=r"--network_dim is not supported: .*no network"):
            PLAIN.options([*REQUIRED, *DATA, "--network_dim=4"])

    def test_whatever_lists_the_flags_of_options_has_their_script_s_defaults(self):
        """A state that is older than a flag says nothing of it where the flag has the default of its script."""
        assert Flags(type(glowing())).defaults() == GLOWING.flags.defaults()
        assert Flags(type(glowing())).by_name["learning_rate"].default == 1e-4

    def test_a_script_s_rules_are_checked_with_the_others(self):
        for words, expected in (
            (["--network_alpha=2"], ["--network_alpha has nothing to act on without --network_dim; add that"]),
            (["--network_dim=2", "--use_ema"], ["--network_dim and --use_ema do not go together"]),
            (["--offload_ema"], ["--offload_ema has nothing to act on without --use_ema"]),
            (["--network_alpha=2", "--offload_ema"], ["--offload_ema has nothing", "--network_alpha has nothing"]),
            (["--network_dim=2", "--network_alpha=2"], []),
        ):
            said = list(problems_of(GLOWING.flags, glowing(*words)))
            assert len(said) == len(expected) and all(map(str.startswith, said, expected))

    def test_a_run_gets_options_families_and_the_recipe(self, monkeypatch, tmp_path):
        called = []
        made_up = types.ModuleType("made_up")
        made_up.train = object()
        monkeypatch.setitem(sys.modules, "made_up", made_up)
        monkeypatch.setattr("library.training.run.run", lambda *given: called.append(given))
        words = [*REQUIRED, *DATA, f"--train_data_dir={tmp_path}", "--glow=1"]
        assert GLOWING.main(words) == 0
        ((options, families, recipe, _, _),) = called
        assert options == glowing(*words) and families == ("sd1",) and recipe is made_up.train

    def test_the_recipe_is_not_asked_where_options_cannot_go_together(self, capsys):
        assert GLOWING.main([*REQUIRED, *DATA, "--network_alpha=2"]) == 2
        assert capsys.readouterr().err.startswith("error: --network_alpha has nothing to act on")


@pytest.mark.parametrize("script", write_flag_docs.scripts(), ids=lambda script: script.name)
def test_each_flag_s_help_is_a_sentence_that_begins_with_its_verb(script):
    """One that begins with "of" or with what the line before says cannot be read alone."""
    helps = [help_line for flag in script.flags for help_line in (flag.help, *(h for _, h in flag.shorthands.values()))]
    assert [each for each in helps if not re.match(r"[A-Z][a-z]+ \S", each) or each.rstrip() != each] == []


def test_ranks_agree_on_the_model_s_flags_but_not_on_where_it_lies():
    script = sdxl_pretrain.SCRIPT
    one = describe_options(script.options([*REQUIRED, *DATA, "--vae=here"]))
    other = script.options(
        ["--pretrained_model_name_or_path=copy", "--output_dir=copy", *DATA, "--vae=there", "--v_parameterization",
         "--max_token_length=225", "--max_data_loader_n_workers=1", "--train_data_dir=copy"]
    )  # fmt: skip
    differing = {name for name, value in describe_options(other).items() if one.get(name) != value}
    assert differing == {"--v_parameterization", "--max_token_length"}
    without = describe_options(script.options([*REQUIRED, *DATA]))
    assert {name for name, value in one.items() if without[name] != value} == {"--vae"}


def test_what_cannot_be_a_listing_is_an_error_of_its_author():
    @dataclass(frozen=True)
    class Wrong(Glowing):
        defaults: typing.ClassVar = {"nothing": 1}

    with pytest.raises(TypeError, match="no flags nothing to give defaults to"):
        Flags(Wrong)

    @dataclass(frozen=True, kw_only=True)
    class Second(OptionGroup):
        glow: int = flag(0, "again", needs="light")

    @dataclass(frozen=True)
    class Twice(Glowing):
        second: Second

    @dataclass(frozen=True)
    class Alone(TrainingOptions):
        second: Second

    with pytest.raises(TypeError, match="--glow is a flag of two groups"):
        Flags(Twice)
    with pytest.raises(TypeError, match="--glow needs --light, which Alone does not have"):
        Flags(Alone)


def parsed(*words):
    script = sdxl_pretrain.SCRIPT
    return script.values([*REQUIRED, *words])


def paths():
    """The flags whose annotation has a path."""
    for group in group_types(sdxl_pretrain.Options).values():
        for part in (group, SubsetOptions) if group is DataOptions else (group,):
            hints = typing.get_type_hints(part)
            names = (field.name for field in dataclasses.fields(part) if "flag" in field.metadata)
            yield from (name for name in names if Path in (hints[name], *typing.get_args(hints[name])))


def test_an_empty_path_is_no_path(tmp_path):
    names = set(paths()) - {"output_dir", "config_file"} | {"vae", "tokenizer1_path", "tokenizer2_path", "resume"}
    assert len(names) >= 8
    for name in names:
        assert parsed(f"--{name}=")[name] is None
        (tmp_path / "run.toml").write_text(f'{name} = ""\n')
        assert parsed(f"--config_file={tmp_path / 'run.toml'}")[name] is None
        (tmp_path / "run.toml").write_text(f'{name} = "some"\n')
        assert parsed(f"--config_file={tmp_path / 'run.toml'}")[name] is not None
        assert parsed(f"--config_file={tmp_path / 'run.toml'}", f"--{name}=")[name] is None
    for name in ("output_dir", "pretrained_model_name_or_path"):
        with pytest.raises(InputError, match=f"--{name} is missing"):
            parsed(f"--{name}=")


def test_every_switch_can_be_off_in_a_file(tmp_path):
    switches = [each.name for each in sdxl_pretrain.SCRIPT.flags if each.kind.switch and each.on_command_line]
    switches = [*(set(switches) - {"output_config"}), "use_8bit_adam", "use_lion_optimizer", "full_fp16", "lowram"]
    file = tmp_path / "run.toml"
    file.write_text("".join(f"{name} = false\n" for name in switches))
    assert len(switches) > 25
    assert parsed(f"--config_file={file}") == parsed() | {"config_file": file}


class TestFlagsOfSdScripts:
    def test_what_asks_for_what_happens_anyway_is_taken(self, tmp_path):
        words = ["--sdpa", "--log_with=tensorboard", "--noise_offset=0.00", "--persistent_data_loader_workers"]
        assert parsed(*words) == parsed()
        file = tmp_path / "run.toml"
        file.write_text('sdpa = true\nlog_with = "tensorboard"\nnoise_offset = 0.0\nxformers = false\n')
        assert parsed(f"--config_file={file}") == parsed() | {"config_file": file}

    def test_the_others_say_what_to_use(self, tmp_path):
        for words in (["--xformers", "--save_n_epoch_ratio", "4"], [f"--config_file={tmp_path / 'run.toml'}"]):
            (tmp_path / "run.toml").write_text("xformers = true\nsave_n_epoch_ratio = 4\n")
            with pytest.raises(InputError) as error:
                parsed(*words)
            printed = str(error.value)
            assert "--xformers is not supported: attention runs by torch's SDPA" in printed
            assert "--save_n_epoch_ratio is not supported: use --save_every_n_epochs" in printed

    def test_none_of_them_shows_a_key(self):
        for word in ("--wandb_api_key=a-secret", "--train_dir=https://me:a-secret@data.test/0.tar?key=a-secret"):
            with pytest.raises(InputError) as error:
                parsed(word)
            assert "a-secret" not in str(error.value)


def test_rules_are_checked_before_torch_is_imported():
    code = (
        "import sys, sdxl_pretrain\n"
        f"status = sdxl_pretrain.main({[*REQUIRED, *DATA, '--offload_ema']!r})\n"
        "print(status, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["2", "False"], done.stderr
