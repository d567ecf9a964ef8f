"""The options and subcommands of `sseapp`. `ssecore.server.command` runs first and prepares the process."""

import argparse
import inspect
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import ssecore
from ssecore.client import listen, publish
from ssecore.errors import SettingsError, SSEAppError
from ssecore.http.tokens import add_token, parse_expiry, read_tokens, revoke_tokens, set_rights
from ssecore.settings import Settings, describe

__all__ = ["load", "main"]

#: Settings that another app makes in its own code.
SERVICE_ONLY: Final = ("data_dir", "log")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    try:
        return int(options.run(options))
    except SSEAppError as error:
        print(f"sseapp: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sseapp",
        description="Serve and read streams of Server-Sent Events.",
        epilog="`sseapp COMMAND --help` shows the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"sseapp {ssecore.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        help="run the service or your own ASGI app",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Run the service, or any ASGI app (`sseapp serve my.module:app`).\n"
        "On SIGTERM, open streams get SSEAPP_DRAIN_S seconds to finish.",
        epilog=f"environment variables (a command-line option overrides its variable):\n{describe()}",
    )
    serve.set_defaults(run=_serve)
    serve.add_argument(
        "app",
        nargs="?",
        metavar="MODULE:APP",
        help="an ASGI app, or a function that returns one; default: the service",
    )
    for option, meaning in (
        ("host", "address to listen on"),
        ("port", "port to listen on; 0 picks a free port"),
        ("data-dir", "folder for the data"),
        ("log", "the event log: sqlite, memory, or a Redis URL"),
    ):
        serve.add_argument(f"--{option}", help=meaning)
    _configure_token(commands.add_parser("token", help="manage access tokens"))
    reading = commands.add_parser("listen", help="read a stream of this or any other server")
    listen.configure(reading)
    reading.set_defaults(run=listen.listen)
    publishing = commands.add_parser("publish", help="publish an event to a topic of a running service")
    publish.configure(publishing)
    publishing.set_defaults(run=publish.publish)
    return parser


def _configure_token(token: argparse.ArgumentParser) -> None:
    token.set_defaults(run=_token)
    token.add_argument("--tokens-file", help="the file of tokens; default: SSEAPP_TOKENS_FILE")
    actions = token.add_subparsers(dest="action", required=True)
    add = actions.add_parser("add", help="create a token and print it; it can't be shown again")
    add.add_argument("name", help="name of the caller who will use the token")
    add.add_argument("--expires", metavar="WHEN", help="90d, 12h, 30m, or a date such as 2030-12-31; default: never")
    actions.add_parser("list", help="list all tokens: id, name, created, expires, rights")
    change = actions.add_parser("set", help="replace a token's rights; its open streams end")
    change.add_argument("which", help="a token's id, or a caller's name for all of their tokens")
    for command in (add, change):
        command.add_argument(
            "--may",
            metavar="RIGHT",
            action="append",
            default=[],
            help="a right to grant: publish, subscribe (every topic), publish:PATTERN, subscribe:PATTERN (such as "
            "publish:topics/orders-* or publish:users/*), or metrics. Repeat it for several rights. "
            "Without it a token can start work and read its caller's own runs",
        )
    revoke = actions.add_parser("revoke", help="revoke a token; its open streams end")
    revoke.add_argument("which", help="a token's id, or a caller's name for all of their tokens")


def _serve(options: argparse.Namespace) -> int:
    from sseapp import SSEApp, create_app
    from ssecore.server.runner import Hosted, serve

    given = {name: getattr(options, name) for name in ("host", "port", *SERVICE_ONLY)}
    if options.app is None:
        settings = Settings.from_env(**given)
        return serve(create_app(settings), settings)
    for name in SERVICE_ONLY:
        if given[name] is not None:
            option = f"--{name.replace('_', '-')}"
            text = f"{option} applies to the service only: in the code of {options.app}, use Settings({name}=…)"
            raise SettingsError(text, field=name)
    settings = Settings.from_env(**given)  # for the runner; the app has its own
    sys.path.insert(0, "")  # a console script has its own folder there
    app = load(options.app)
    return serve(app if isinstance(app, SSEApp) else Hosted(app), settings)


def load(target: str) -> Any:
    """Import `package.module:name`, an ASGI app or a function without parameters that returns one.

    Raises `SettingsError`, and whatever the module raises.
    """
    module_name, colon, path = target.partition(":")
    if not module_name or not colon or not path:
        raise SettingsError(f"{target!r} is not MODULE:APP: write it like my.module:app", field="app")
    try:
        found: Any = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # an import inside the app failed
        text = f"no module named {error.name!r}: run this in the folder of your app, or install the package"
        raise SettingsError(text, field="app") from None
    for name in path.split("."):
        if not hasattr(found, name):
            raise SettingsError(f"{target!r}: {module_name} has no {path!r}", field="app")
        found = getattr(found, name)
    if inspect.isfunction(found) and not inspect.signature(found).parameters:
        found = found()
    if not callable(found):
        raise SettingsError(f"{target!r} is not an ASGI app: its type is {type(found).__name__}", field="app")
    return found


def _token(options: argparse.Namespace) -> int:
    # Reads no other setting: an invalid one must not prevent a revocation.
    given = os.environ.get("SSEAPP_TOKENS_FILE", "") if options.tokens_file is None else options.tokens_file
    if given.lower() in ("none", ""):
        raise SettingsError("no token file given: set SSEAPP_TOKENS_FILE or pass --tokens-file")
    path = Path(given)
    if options.action == "add":
        _check_patterns(options.may)
        expiry = parse_expiry(options.expires) if options.expires is not None else None
        print(add_token(path, options.name, expiry, options.may))
        until = f"until {expiry.isoformat()}" if expiry is not None else "until it is revoked"
        rights = ", ".join(options.may) or "start work and read the caller's own runs (see --may)"
        print(f"token for {options.name}, valid {until}; rights: {rights}", file=sys.stderr)
        print("The token is not stored and won't be shown again: save it now.", file=sys.stderr)
        return 0
    if options.action == "list":
        for entry in read_tokens(path):
            until = entry.expires.isoformat() if entry.expires is not None else "never"
            rights = ", ".join(entry.rights) or "-"
            print(entry.id, entry.name, entry.created.isoformat(), until, rights, sep="\t")
        return 0
    if options.action == "set":
        _check_patterns(options.may)
        found, what = set_rights(path, options.which, options.may), "changed"
    else:
        found, what = revoke_tokens(path, options.which), "revoked"
    print(f"{len(found)} of {options.which}'s tokens {what}", file=sys.stderr)
    return 0 if found else 1


def _check_patterns(may: Sequence[str]) -> None:
    """Refuse a pattern that matches none of the service's routes, such as `publish:orders-*` without `topics/`."""
    patterns = [right for right in may if ":" in right]
    if not patterns:
        return
    try:
        from handlers import ROUTES
    except ModuleNotFoundError:  # the routes belong to another app
        return
    kinds = sorted({route.may.partition("{")[0] for route in ROUTES if ":" in route.may})
    for right in patterns:
        if not right.startswith(tuple(kinds)):
            text = f"{right!r:.60} matches no route: a pattern must begin with {', '.join(kinds)}"
            raise SettingsError(text, field="may")
