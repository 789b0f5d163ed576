"""python -m maect_jax COMMAND …: finds the command and runs it."""

from maect_jax.commands import compare, convert, data, doctor, embed, evaluate, inspect
from maect_jax.terminal import Parser, guard

COMMANDS = {"evaluate": evaluate, "embed": embed, "compare": compare, "convert": convert, "inspect": inspect}
COMMANDS |= {"data": data, "doctor": doctor}


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status."""

    def action() -> None:
        parser = Parser(prog="python -m maect_jax", description=__doc__)
        commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser, metavar="COMMAND")
        for name, module in COMMANDS.items():
            summary, _, more = module.__doc__.partition("\n")
            module.add_arguments(commands.add_parser(name, help=summary, description=summary + more))
        chosen, chosen.settings = parser.parse_known_args(arguments)
        if chosen.settings and COMMANDS[chosen.command] is not doctor:
            parser.error(f"unrecognized arguments: {' '.join(chosen.settings)}")
        COMMANDS[chosen.command].main(chosen)

    return guard(action)
