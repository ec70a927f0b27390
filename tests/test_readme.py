"""Every command of the README is one that the scripts understand, and every file that it names is there."""

from __future__ import annotations

import re
import shlex

import pytest
from conftest import ROOT

import eval as eval_script
import train
from tools import audit
from tools.export import __main__ as export
from tools.formats import __main__ as formats

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [text for kind, text in re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE) if not kind]
LINES = [line.partition("  #")[0] for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
LINES = [command for line in LINES for command in line.split(" && ")]
COMMANDS = [line for line in LINES if re.match(r"(python|torchrun) ", line)]
PARSERS = {
    "train.py": train.build_parser(),
    "eval.py": eval_script.build_parser(),
    "tools.export": export.build_parser(),
    "-m tools.audit": audit.build_parser(),
    "-m tools.formats": formats.build_parser(),
}


def test_there_are_commands():
    scripts = {name for name in PARSERS for command in COMMANDS if name in command}
    assert scripts == set(PARSERS)


@pytest.mark.parametrize("command", [c for c in COMMANDS if "pytest" not in c and "benchmarks/" not in c])
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


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()
