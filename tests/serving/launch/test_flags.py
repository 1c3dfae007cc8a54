import dataclasses
from pathlib import Path

import pytest

from serving.errors import ConfigurationError
from serving.launch.config import SECTIONS, ServeConfig, settings
from serving.launch.flags import build, help_page, parse, read_preset, to_flags

CONFIGS = Path(__file__).parents[3] / "configs"


def parsed(*flags, program="lumen-serve"):
    return parse(program, [program, *flags], "about", "example").config


def test_no_flags_give_the_defaults():
    assert parsed() == ServeConfig()


def test_every_setting_is_a_flag_of_one_name_only():
    names = [name for _, name, _ in settings()]
    assert len(names) == len(set(names))
    covered = {section for sections in SECTIONS.values() for section in sections}
    assert covered == {section.name for section in dataclasses.fields(ServeConfig)}


def test_flags_reach_the_tree_with_their_types():
    config = parsed(
        "--replicas=3", "--memory_fraction=0.5", "--noprefix_cache", "--model=random:tiny-llama"
    )
    assert config.devices.replicas == 3
    assert config.batching.memory_fraction == 0.5
    assert config.batching.prefix_cache is False
    assert config.model.model == "random:tiny-llama"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--http_prt=1"], "http_prt"),
        (["--http_port=x"], "--http_port"),
        (["--http_port=8001"], "--grpc_port"),
        (["--http_port=70000"], "--http_port"),
        (["--replicas=0"], "--replicas"),
        (["--replicas=1.5"], "--replicas"),
        (["--memory_fraction=nan"], "--memory_fraction"),
        (["--platform=abacus"], "--platform"),
        (["--prefix_cache=perhaps"], "prefix_cache"),
        (["--host="], "--host"),
        (["--token_budget=16"], "--token_budget"),
        (["model"], "'model'"),
        (["--config=missing.toml"], "missing.toml"),
        (["--workers=a:1"], "workers"),  # a gateway's flag, not lumen-serve's
        (["--supervisor_fds=1"], "--supervisor_fds"),
    ],
)
def test_wrong_settings_are_refused_by_name(flags, named):
    with pytest.raises(ConfigurationError, match=r"--|'model'|_") as refusal:
        parsed(*flags)
    assert named in str(refusal.value)
    assert str(refusal.value).endswith(".")


def test_flags_win_over_the_preset(tmp_path):
    preset = tmp_path / "p.toml"
    preset.write_text("[batching]\nnum_rows = 8\nblock_size = 32\n[worker]\nlease_s = 5\n")
    config = parsed(f"--config={preset}", "--num_rows=4")
    assert (config.batching.num_rows, config.batching.block_size) == (4, 32)
    assert config.worker.lease_s == 60.0  # not a section of this program
    assert parsed(f"--config={preset}", program="lumen-worker").worker.lease_s == 5


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("num_rows = 8", "num_rows"),
        ("[batching]\nrows = 8", "batching.rows"),
        ("[engine]\nnum_rows = 8", "engine.num_rows"),
        ("[batching]\nnum_rows = 'eight'", "--num_rows"),
        ("[batching]\nnum_rows = true", "--num_rows"),
        ("[batching", "TOML"),
    ],
)
def test_wrong_presets_are_refused_by_file_and_key(tmp_path, text, named):
    preset = tmp_path / "p.toml"
    preset.write_text(text)
    with pytest.raises(ConfigurationError, match=r"p\.toml") as refusal:
        parsed(f"--config={preset}")
    assert named in str(refusal.value)


@pytest.mark.parametrize("preset", sorted(CONFIGS.glob("*.toml")), ids=lambda p: p.name)
def test_shipped_presets_are_valid(preset):
    assert read_preset(preset, SECTIONS["lumen-serve"])
    parsed(f"--config={preset}")


@pytest.mark.parametrize("program", SECTIONS)
def test_children_get_the_same_configuration(program):
    config = build(
        {
            "model": "random:tiny-llama", "replicas": 3, "prefix_cache": False, "http_port": 0,
            "workers": "a:1,b:2", "listen": "127.0.0.1:7", "drain_s": 2.5, "check_prompt": "",
        }
    )  # fmt: skip
    again = parsed(*to_flags(config, program), program=program)
    for section in SECTIONS[program]:
        assert getattr(again, section) == getattr(config, section)


def test_help_shows_each_flag_with_default_and_stays_short(capsys):
    with pytest.raises(SystemExit) as end:
        parsed("--help")
    assert end.value.code == 0
    page = capsys.readouterr().out
    assert page == help_page("lumen-serve", "about", "example") + "\n"
    for _, name, _ in settings(SECTIONS["lumen-serve"]):
        assert f"--{name}" in page
    assert "[8000]" in page
    assert len(page.splitlines()) < 70
    assert max(map(len, page.splitlines())) <= 100
