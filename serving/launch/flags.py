"""Command lines: absl flags made from the configuration tree, presets, and the help page."""

import dataclasses
import sys
import textwrap
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from serving.errors import ConfigurationError
from serving.launch.config import (
    SECTIONS,
    ServeConfig,
    SettingInfo,
    SettingValue,
    check_value,
    settings,
)

SECTION_TITLES = {
    "model": "Model",
    "devices": "Devices",
    "batching": "Batching and memory",
    "front_door": "Front door",
    "worker": "Worker",
    "gateway": "Gateway",
    "life": "Starting and stopping",
    "record": "Recording",
    "check": "Self-check",
}

EXIT_CONFIGURATION = 2  # a child that exits so would do it again: it is not restarted


@dataclasses.dataclass(frozen=True, slots=True)
class CommandLine:
    """What a program was asked to do. `supervisor`: pipes inherited from lumen-serve, if any."""

    config: ServeConfig
    supervisor: tuple[int, int] | None


def parse(program: str, argv: Sequence[str], about: str, example: str) -> CommandLine:
    """Read flags and preset. Prints the help page and exits if that is what was asked for.

    argv: the command line, the program's own name first.
    Raises ConfigurationError naming the flag or preset key.
    """
    sections = SECTIONS[program]
    if any(word in ("--help", "-h", "--helpfull", "--helpshort") for word in argv[1:]):
        print(help_page(program, about, example))
        sys.exit(0)
    values = _define(sections)
    try:
        rest = values(list(argv))[1:]
    except flags.Error as error:
        raise ConfigurationError(
            f"{_sentence(str(error))} `{program} --help` lists what there is."
        ) from error
    if rest:
        raise ConfigurationError(
            f"{rest[0]!r} is not a flag; settings are given as --name=value "
            f"(`{program} --help` lists them)."
        )
    given: dict[str, SettingValue] = {}
    if values.config:
        given.update(read_preset(Path(values.config).expanduser(), sections))
    for _, name, info in settings(sections):
        if values[name].present:
            given[name] = _typed(name, info, values[name].value)
    return CommandLine(build(given), _fds(values.supervisor_fds))


def build(given: dict[str, SettingValue]) -> ServeConfig:
    """The tree with these settings in place of defaults. Raises ConfigurationError."""
    sections: dict[str, dict[str, SettingValue]] = {}
    infos = {name: (section, info) for section, name, info in settings()}
    for name, value in given.items():
        section, info = infos[name]
        check_value(name, info, value)
        sections.setdefault(section, {})[name] = value
    base = ServeConfig()
    changed: dict[str, Any] = {
        section: dataclasses.replace(getattr(base, section), **values)
        for section, values in sections.items()
    }
    return dataclasses.replace(base, **changed)


def read_preset(path: Path, sections: tuple[str, ...]) -> dict[str, SettingValue]:
    """Settings of a TOML preset: one table per section, one key per setting.

    Those of sections this program does not use are checked and left out. Raises
    ConfigurationError naming file and key.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(
            f"--config: {path} cannot be read ({error.strerror}); name a preset such as "
            "configs/cpu.toml."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--config: {path} is not valid TOML: {error}.") from error
    known = {(section, name): info for section, name, info in settings()}
    found: dict[str, SettingValue] = {}
    for section, table in tables.items():
        if not isinstance(table, dict):
            raise ConfigurationError(
                f"--config: {section} in {path} stands outside a table; settings belong under "
                f"one of [{'], ['.join(SECTION_TITLES)}]."
            )
        for name, value in table.items():
            info = known.get((section, name))
            if info is None:
                raise ConfigurationError(
                    f"--config: {path} sets {section}.{name}, which does not exist."
                )
            try:
                check_value(name, info, value)
            except ConfigurationError as error:
                raise ConfigurationError(f"{error} (set in {path})") from error
            if section in sections:
                found[name] = value
    return found


def to_flags(config: ServeConfig, program: str) -> list[str]:
    """The flags that make `program` arrive at this configuration, defaults left out."""
    default = ServeConfig()
    given = []
    for section, name, info in settings(SECTIONS[program]):
        value = getattr(getattr(config, section), name)
        if value != getattr(getattr(default, section), name) and value is not None:
            text = str(value).lower() if info.kind is bool else str(value)
            given.append(f"--{name}={text}")
    return given


def help_page(program: str, about: str, example: str) -> str:
    """What `--help` prints: the program's own flags by section, with defaults, and an example."""
    lines = [f"{program}: {about}", "", "Example:", textwrap.indent(example, "  "), ""]
    default = ServeConfig()
    for section in SECTIONS[program]:
        lines.append(f"{SECTION_TITLES[section]}:")
        for _, name, info in settings((section,)):
            lines.extend(_help_lines(name, info, getattr(getattr(default, section), name)))
        lines.append("")
    lines.append("Presets:")
    lines.extend(_wrapped("--config", "TOML file of settings, for example configs/cpu.toml; "
                          "flags given beside it win."))  # fmt: skip
    return "\n".join(lines)


def _help_lines(name: str, info: SettingInfo, default: SettingValue) -> list[str]:
    text = info.help
    if info.choices:
        text += f" One of {', '.join(info.choices)}."
    if default is None:
        text += f" [{info.unset}]"
    elif default != "":
        text += f" [{str(default).lower() if info.kind is bool else default}]"
    return _wrapped(f"--{name}", text)


def _wrapped(flag: str, text: str) -> list[str]:
    indent = 24
    lines = textwrap.wrap(text, width=96 - indent, break_on_hyphens=False)
    return [f"  {flag:<{indent - 2}}{lines[0]}", *(" " * indent + line for line in lines[1:])]


def _define(sections: tuple[str, ...]) -> Any:
    values = flags.FlagValues()  # type: ignore[no-untyped-call]  # absl leaves it untyped
    for _, name, info in settings(sections):
        if info.kind is bool:
            flags.DEFINE_boolean(name, None, info.help, flag_values=values)
        else:
            flags.DEFINE_string(name, None, info.help, flag_values=values)
    flags.DEFINE_string("config", None, "TOML preset.", flag_values=values)
    flags.DEFINE_string(
        "supervisor_fds", None, "Pipes inherited from lumen-serve.", flag_values=values
    )
    return values


def _typed(name: str, info: SettingInfo, text: Any) -> SettingValue:
    if info.kind is bool or info.kind is str:
        return text  # type: ignore[no-any-return]  # absl made it a bool or a str
    if text == "" and info.unset:
        return None
    try:
        return int(text) if info.kind is int else float(text)
    except ValueError:
        check_value(name, info, text)
        raise


def _fds(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    try:
        status, lifeline = (int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigurationError(
            f"--supervisor_fds is {text!r}; it is set by lumen-serve and by nobody else."
        ) from error
    return status, lifeline


def _sentence(text: str) -> str:
    return text.strip().rstrip(" ?.") + "."
