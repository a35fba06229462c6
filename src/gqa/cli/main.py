"""The entry point: a group that imports a command's module only when that command runs."""

from __future__ import annotations

import importlib
import shlex
import sys

import click

from gqa import __version__
from gqa.cli import output
from gqa.errors import GqaError

# command -> what it does; its module is gqa.cli.<command>, its click command is that module's `command`
COMMANDS = {
    "study": "the whole path in one run: convert, evaluate, uptrain, measure, report",
    "plan": "what fewer KV heads would save",
    "claims": "do the published figures add up?",
    "convert": "turn a multi-head checkpoint into a grouped-query one",
    "uptrain": "win back the quality with a little training",
    "eval": "measure what a conversion cost in quality",
    "generate": "text from a model, and how fast it came",
    "bench": "how fast attention and a model are here, and what the limit is",
    "report": "make the report page from a study's record",
    "env": "what a bug report needs",
}

EXAMPLES = """\
  gqa study
  gqa plan llama-3-70b --kv-heads 64,8,1 --context 128k --device "H100 SXM"
  gqa convert ./my-mha-model ./my-gqa-model --kv-heads 8 --calibrate corpus.txt
"""


class _Group(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f"gqa.cli.{cmd_name}").command

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write(f"Examples:\n{EXAMPLES}\n")
        self.format_usage(ctx, formatter)
        self.format_help_text(ctx, formatter)
        with formatter.section("Commands"):  # from the table, so that --help imports no command
            formatter.write_dl(list(COMMANDS.items()))
        with formatter.section("Options"):
            formatter.write_dl([record for p in self.get_params(ctx) if (record := p.get_help_record(ctx))])


@click.command(cls=_Group, no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="gqa %(version)s")
def group() -> None:
    """Grouped-query attention as a dial: from one KV head per query head (MHA) to a single one (MQA)."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave the process: 0 yes, 1 the answer is no, 2 usage or input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        code = group.main(arguments, prog_name="gqa", standalone_mode=False)
    except GqaError as error:
        output.error(error)
        code = 2
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "gqa"
        output.error(GqaError(error.format_message(), hint=f"{path} --help"))
        code = 2
    except (KeyboardInterrupt, click.Abort):
        output.note(f"interrupted; to go on: gqa {shlex.join(arguments)}")
        code = 130
    except BrokenPipeError:
        # The reader of our output has gone (`| head`): say nothing, and keep Python from flushing into it at exit.
        sys.stdout = None
        code = 0
    except OSError as error:
        if error.errno is None:  # not the system speaking, but a library: a bug of ours, to be seen whole
            raise
        place = f"{error.filename}: " if error.filename else ""
        output.error(GqaError("a file could not be read or written", got=f"{place}{error.strerror}"))
        code = 2
    sys.exit(code if isinstance(code, int) else 0)
