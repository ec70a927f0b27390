"""Every command of the README is one that the scripts understand, and every file that it names is there."""

from __future__ import annotations

import re
import shlex

import pytest
from conftest import ROOT

import eval as eval_script
import train
from tools import audit, demo, pseudo_masks
from tools.export import __main__ as export
from tools.formats import __main__ as formats

PAGES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
README = PAGES[ROOT / "README.md"]
BLOCKS = [
    text
    for path, page in PAGES.items()
    if path.name != "experiments.md"  # the commands of its time
    for kind, text in re.findall(r"^```(\w*)\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    if not kind
]
LINES = [line.partition("  #")[0] for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
LINES = [command for line in LINES for command in line.split(" && ")]
COMMANDS = sorted({line for line in LINES if re.match(r"(python|torchrun) ", line)})
PARSERS = {
    "train.py": train.build_parser(),
    "eval.py": eval_script.build_parser(),
    "-m tools.export": export.build_parser(),
    "-m tools.demo": demo.build_parser(),
    "-m tools.audit": audit.build_parser(),
    "-m tools.pseudo_masks": pseudo_masks.build_parser(),
    "-m tools.formats": formats.build_parser(),
}


def test_there_are_commands():
    scripts = {name for name in PARSERS for command in COMMANDS if name in command}
    assert scripts == set(PARSERS)


@pytest.mark.parametrize("command", [c for c in COMMANDS if not re.search("pytest|benchmarks/|examples/", c)])
def test_commands_are_understood(command):
    script = next(name for name in PARSERS if f" {name} " in command)
    words = shlex.split(command.partition(f" {script} ")[2].replace("...", ""))
    PARSERS[script].parse_args(words)


def test_configurations_of_the_commands_exist():
    from config import get_config, parse_overrides

    for name in re.findall(r"--config (\w+)(?![\w.])", README):
        get_config(name)
    for command in COMMANDS:
        if "--set" in command:
            words = shlex.split(command)
            settings = words[words.index("--set") + 1 :]
            stop = next((i for i, word in enumerate(settings) if word.startswith("--")), len(settings))
            parse_overrides(settings[:stop])


LINKS = {(path, target) for path, page in PAGES.items() for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page)}


@pytest.mark.parametrize(("path", "target"), sorted(LINKS), ids=str)
def test_links_lead_somewhere(path, target):
    assert (path.parent / target).exists()


def test_the_reading_order_states_the_numbers_of_lines():
    rows = re.findall(r"^\| `([\w/]+(?:\.py)?)/?` \| (\d+) \|", README, re.MULTILINE)
    assert len(rows) == 7
    for name, stated in rows:
        path = ROOT / name
        files = [path] if path.is_file() else sorted(path.glob("*.py"))
        lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
        assert lines == int(stated), f"{name} has {lines} lines"


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200
