"""README and docs: commands are parsed, flags exist, Python compiles, links lead somewhere."""

import argparse
import importlib
import re
import shlex
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = re.compile(r"(?:torchrun --nproc-per-node \d+|python) (?:-m )?(\S+)(.*)")
OTHERS = ("pip install", "pytest", "ruff", "python -m build", "python -m fgclip.clip_benchmark")  # of other parsers
SCRIPTS = ("train_stage1", "train_stage2", "train_fgclip", "train_video")
COMMANDS = "macl.evaluate macl.predict fgclip.evaluate fgclip.score fgclip.extract fgclip.evaluate_video fgclip.watch "
COMMANDS += "fgclip.pack macl.export fgclip.export"
COMMANDS = [*COMMANDS.split(), "trainkit.report", "benchmarks.ablation"]


def blocks(path: Path) -> list[str]:
    """The indented blocks of a document, without their indentation; those of list items are text."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    return [textwrap.dedent(block) for block in re.findall(r"(?:^\n)((?:^    .*\n|^\n(?=    ))+)", text, flags=re.M)]


def commands() -> list[tuple[str, str]]:
    found = []
    for path in DOCUMENTS:
        lines = [line for block in blocks(path) for line in block.splitlines()]
        lines += re.findall(r"`((?:python \w|python -m \w|torchrun )[^`]+)`", path.read_text(encoding="utf-8"))
        for line in lines:
            for command in line.split("#")[0].split("&&"):
                if command.strip().startswith(("python", "torchrun", *OTHERS)):
                    found.append((path.name, command.strip()))
    return sorted(set(found))


class Parsed(Exception):
    """Ends a command when its flags are parsed."""


@pytest.fixture
def parser_of(monkeypatch):
    """parser_of(module, arguments): the command's parser, after it has accepted the arguments."""
    monkeypatch.syspath_prepend(str(ROOT))
    parse, seen = argparse.ArgumentParser.parse_args, []

    def parse_args(self, args=None, namespace=None):
        seen.append(self)
        parse(self, args, namespace)
        raise Parsed

    def run(name: str, arguments: list[str]) -> argparse.ArgumentParser:
        module = importlib.import_module(name)
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        for reader in ("read_checkpoint", "saved_flags"):  # the files that the documents name do not exist
            if hasattr(module, reader):
                monkeypatch.setattr(module, reader, lambda *_: {})
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        with pytest.raises(Parsed):
            module.main(arguments) if "benchmarks" not in name else module.main()
        return seen[-1]

    return run


@pytest.mark.parametrize(("document", "command"), commands(), ids=lambda value: value)
def test_a_command_is_accepted_by_the_parser_that_it_names(document, command, parser_of):
    if command.startswith(OTHERS):
        return
    name, flags = RUN.fullmatch(command).groups()
    arguments = [flag for flag in shlex.split(flags.replace("...", "")) if flag != "--help"]
    parser_of(name.removesuffix(".py").replace("/", "."), arguments)


def test_the_documents_hold_commands_of_every_kind():
    names = " ".join(command for _, command in commands())
    assert all(name in names for name in (*SCRIPTS, *COMMANDS[:-1], "torchrun", "pytest"))


def test_every_flag_that_a_document_names_exists(parser_of):
    known = {"--nproc-per-node", "--no-index"}
    for name in (*SCRIPTS, *COMMANDS):
        needed = {"macl.predict": "--checkpoint a --output b", "fgclip.evaluate": "--checkpoint a"}
        needed |= {"fgclip.pack": "--annotations a --image-root b --output c"}
        needed |= {"fgclip.score": "--checkpoint a --image b", "trainkit.report": "a"}
        needed |= {"macl.export": "--checkpoint a --output b", "fgclip.export": "a b"}
        needed |= {
            "fgclip.extract": "--init-from a --data-root b --features c",
            "fgclip.evaluate_video": "--checkpoint a",
        }
        needed |= {"fgclip.watch": "--checkpoint a --video b --output c"}
        parser = parser_of(name, needed.get(name, "").split())
        known |= {flag for action in parser._actions for flag in action.option_strings}
    for path in DOCUMENTS:
        for code in re.findall(r"`([^`\n]+)`", path.read_text(encoding="utf-8")):
            for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", "" if code.startswith(OTHERS) else code):
                assert flag in known, f"{path.name} names {flag}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_compiles_and_links_lead_somewhere(document):
    for block in blocks(document):
        if re.match(r"(import|from) ", block):
            compile(block, document.name, "exec")
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), target


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 9000
