"""Write docs/cli.md from the commands' own help.

usage: python tools/cli_docs.py            write docs/cli.md
       python tools/cli_docs.py --check    exit with 1 if docs/cli.md is not what would be written
"""

import sys
from pathlib import Path

import click

from relexio.cli.main import relexio_command

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
WIDTH = 100

HEAD = """\
# The command line

This page is made by `python tools/cli_docs.py` from what `relexio --help` and `relexio COMMAND --help` print.
Change the commands, not this page.
"""

TAIL = """\
## Exit codes

| code | meaning |
|---|---|
| 0 | done |
| 1 | an error of the input or the machine: a damaged file, a step that is not there, too little memory, a full disk |
| 2 | wrong usage: an unknown option, a missing argument, a text that is not a size or a step expression |
| 130, 143, 129 | interrupted: Ctrl-C, SIGTERM, SIGHUP |

An error is one line on stderr that begins with `error:` and says what, where, and what to do. Wrong usage is told as
click tells it. An output that exists is never overwritten: that is an error.

After an interruption, or a disk that was full, the same `convert` command goes on with the blocks that are whole.
An interrupted `predict` leaves nothing unfinished under the name of an output; the same command begins that output
again, and the fit, if it was finished, is in the store. The same `sweep` command goes on with the evaluations that gave no
score yet.

## Sizes

`--memory` and `--device-memory` take a number of bytes, with a unit or without: `2GB`, `512MiB`, `1.5G`, `1000000`.
K, M, G and T count in thousands, Ki, Mi, Gi and Ti in 1024s. A `B` at the end and the case of letters make no
difference.

`--memory` bounds the resident memory of the whole process, the interpreter and its libraries with it. The bound is
checked against a plan before any block is worked on: if it is too small for one worker, the command ends with
exit code 1 and names the least that would do. `--dry-run` shows the plan.

With `--scheduler` it bounds worker processes instead: each one of a cluster, or all local ones and the command together
([clusters.md](clusters.md)).

## Step expressions

`--steps` and `--window` take a comma-separated list. Each piece is one of these, and both ends are included:

| piece | steps |
|---|---|
| `5` | step 5 |
| `1:75` | every step from 1 to 75 |
| `10:300:10` | 10, 20, 30, up to 300 |
| `80:` | 80 and all that follow |

A range takes those of its steps that exist. A step that a piece names alone must exist. `--steps` chooses among the
checkpoints below CHECKPOINTS, `--window` among the steps in the store. `--steps` of `sweep` are those to predict: every
step of a range, so that it needs an end, and mostly a stride.

## stdout and stderr

Results go to stdout; with `--json` they are one line of JSON and nothing else. `predict --json` prints an object for one
step, and a list of objects for several. Notes (lines that begin with `note:`), errors and progress go to stderr.
Progress is a bar on a terminal and a line now and then elsewhere; a stage that takes less than a second prints none.
`--quiet` shows none at all; notes and errors stay.

## Completion

Your shell completes commands and options after one of these lines, which belongs into its startup file:

```sh
eval "$(_RELEXIO_COMPLETE=bash_source relexio)"                                       # ~/.bashrc
eval "$(_RELEXIO_COMPLETE=zsh_source relexio)"                                        # ~/.zshrc
_RELEXIO_COMPLETE=fish_source relexio > ~/.config/fish/completions/relexio.fish       # once
```
"""


def section(title: str, context: click.Context) -> str:
    """A heading and one command's help as it stands."""
    return f"## {title}\n\n```text\n{context.command.get_help(context)}\n```\n"


def page() -> str:
    """The whole page, the same whatever the terminal."""
    settings = relexio_command.context_settings
    group = click.Context(relexio_command, info_name="relexio", terminal_width=WIDTH, **settings)
    parts = [HEAD, section("relexio", group)]
    for name in relexio_command.list_commands(group):
        command = relexio_command.get_command(group, name)
        assert command is not None
        parts.append(section(f"relexio {name}", click.Context(command, parent=group, info_name=name)))
    return "\n".join([*parts, TAIL])


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    text = page()
    if not arguments:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        print("docs/cli.md is not current; run: python tools/cli_docs.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
