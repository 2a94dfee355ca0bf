"""`probeprune completion`: a script that completes commands and options in a shell.

The script holds all words, so a completion starts no Python: importing torch and transformers would take
seconds at every press of the key.
"""

from collections.abc import Iterable
from typing import Annotated, Any

import typer

from probeprune.errors import UsageError, unknown
from probeprune.methods import METHODS

_NAMED = {"--method": METHODS, "--methods": METHODS}
"""Options whose values have names, and these. Values of all others are completed as files."""


def completion(
    context: typer.Context,
    shell: Annotated[str, typer.Argument(help="Shell: bash, zsh or fish.")],
) -> None:
    """Print a script that completes commands, options and names of methods in your shell.

    Example: [bold]probeprune completion bash > ~/.local/share/bash-completion/completions/probeprune[/bold]
    """
    if shell not in SCRIPTS:
        raise UsageError(unknown("shell", shell, SCRIPTS))
    group: Any = context.parent and context.parent.command
    options = {"": _options(group)} | {name: _options(known) for name, known in group.commands.items()}
    print(SCRIPTS[shell](options))


def _options(command: Any) -> dict[str, str]:
    """The long options of a command, and the first sentence of their help."""
    return {
        form: (getattr(option, "help", None) or "").split(". ")[0]
        for option in command.params
        for form in option.opts
        if form.startswith("--")
    } | {"--help": "Show how it is used"}


def _bash(options: dict[str, dict[str, str]]) -> str:
    commands = [name for name in options if name]
    named = "\n".join(
        f"        {option}) words='{_words(values)}' ;;" for option, values in sorted(_NAMED.items())
    )
    cases = "\n".join(
        f"            {name or chr(39) * 2}) words='{_words(options[name])}' ;;" for name in options
    )
    return f"""_probeprune() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}} command= words= word
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        case $word in
            {"|".join(commands)}) command=$word; break ;;
        esac
    done
    case $previous in
{named}
        *) case $command in
{cases}
        esac ;;
    esac
    [[ $command ]] || words="$words {_words(commands)}"
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o bashdefault -o default -F _probeprune probeprune"""


def _zsh(options: dict[str, dict[str, str]]) -> str:
    return "#compdef probeprune\nautoload -U +X bashcompinit && bashcompinit\n" + _bash(options)


def _fish(options: dict[str, dict[str, str]]) -> str:
    commands = [name for name in options if name]
    lines = [f"complete -c probeprune -n __fish_use_subcommand -f -a '{_words(commands)}'"]
    for name, known in options.items():
        when = f"__fish_seen_subcommand_from {name}" if name else "__fish_use_subcommand"
        for option, meaning in known.items():
            values = f" -x -a '{_words(_NAMED[option])}'" if option in _NAMED else ""
            told = meaning.replace("\\", "").replace("'", "\\'")
            lines.append(f"complete -c probeprune -n '{when}' -l {option[2:]}{values} -d '{told}'")
    return "\n".join(lines)


def _words(words: Iterable[str]) -> str:
    return " ".join(words)


SCRIPTS = {"bash": _bash, "zsh": _zsh, "fish": _fish}
"""What writes the script, by shell: from the options of each command, those of all commands under ''."""
