"""Hooks of the documentation site: pages made from the package, and links out of docs/ shown as paths.

`<!-- commands -->` in a page becomes every command with its options, `<!-- presets -->` every preset's file.
"""

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#\s]*)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The text of a page as the site shows it; MkDocs calls this for each one."""
    if "<!-- commands -->" in markdown:
        markdown = markdown.replace("<!-- commands -->", commands())
    if "<!-- presets -->" in markdown:
        markdown = markdown.replace("<!-- presets -->", presets())
    docs, here = Path(config["docs_dir"]), Path(page.file.abs_src_path).parent

    def shown(link: re.Match[str]) -> str:
        target = Path(os.path.normpath(here / link[2]))
        if target.is_relative_to(docs):
            return link[0]
        if not target.exists():
            raise FileNotFoundError(f"{page.file.src_path}: {link[2]}")
        path = target.relative_to(ROOT).as_posix()
        label = link[1].strip("`")
        return f"`{path}`" if path.endswith(label) else f"{link[1]} (`{path}`)"

    return LINK.sub(shown, markdown)


def commands() -> str:
    """Every command: what its help says, and a table of its options."""
    import typer

    from probeprune.cli import app

    parts = []
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        text = re.sub(r"\[/?bold\]", "`", command.help or "")
        parts += [f"## probeprune {name}\n", text, ""]
        parts += ["| option | default | what it sets |", "| --- | --- | --- |"]
        for parameter in command.params:
            names = " ".join(f"`{one}`" for one in (*parameter.opts, *parameter.secondary_opts))
            shown = parameter.show_default if isinstance(parameter.show_default, str) else parameter.default
            default = "-" if shown is None or shown is False or callable(shown) else f"`{shown}`"
            if parameter.required:
                default = "must be given"
            parts.append(f"| {names} | {default} | {_cell(parameter.help or '')} |")
        parts.append("")
    return "\n".join(parts)


def presets() -> str:
    """Every preset's file."""
    from probeprune.experiment import presets as module

    folder = Path(module.__file__).parent / "preset_files"
    files = sorted(folder.glob("*.yaml"))
    return "\n".join(f"## {file.stem}\n\n```yaml\n{file.read_text(encoding='utf-8')}```\n" for file in files)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("[", "\\[")
