"""The command `sseapp`: its options, and what each of its commands does.

`ssecore.server.command` runs first, and prepares the process. No other module of the engine imports `sseapp`.
"""

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

#: Options of `serve` that are settings of the service alone: a program decides them in its code.
OF_THE_SERVICE: Final = ("data_dir", "log")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `sseapp`. Returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    try:
        code: int = options.run(options)
        return code
    except SSEAppError as error:
        print(f"sseapp: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sseapp",
        description="Streams over Server-Sent Events.",
        epilog="`sseapp COMMAND --help` shows the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"sseapp {ssecore.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        help="run the service, or a program of yours",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Runs the service, or any ASGI program (`sseapp serve my.module:app`), with a drain at its end.",
        epilog=f"variables, each of them a setting (an option wins over its variable):\n{describe()}",
    )
    serve.set_defaults(run=_serve)
    serve.add_argument(
        "app",
        nargs="?",
        metavar="MODULE:APP",
        help="an ASGI program, or a function that makes one; default: the service",
    )
    for option, meaning in (
        ("host", "address to listen on"),
        ("port", "port to listen on; 0 takes a free one"),
        ("data-dir", "folder of the data"),
        ("log", "the event log: sqlite, memory, or a Redis URL"),
    ):
        serve.add_argument(f"--{option}", help=meaning)
    _configure_token(commands.add_parser("token", help="the tokens that callers show"))
    reading = commands.add_parser("listen", help="read a stream, from here or anywhere")
    listen.configure(reading)
    reading.set_defaults(run=listen.listen)
    publishing = commands.add_parser("publish", help="send an event to a topic of a running service")
    publish.configure(publishing)
    publishing.set_defaults(run=publish.publish)
    return parser


def _configure_token(token: argparse.ArgumentParser) -> None:
    token.set_defaults(run=_token)
    token.add_argument("--tokens-file", help="the file; default: SSEAPP_TOKENS_FILE")
    actions = token.add_subparsers(dest="action", required=True)
    add = actions.add_parser("add", help="make a token and print it, this once")
    add.add_argument("name", help="whose it is: the caller's name")
    add.add_argument("--expires", metavar="WHEN", help="90d, 12h, 30m, or a date such as 2030-12-31; default: never")
    actions.add_parser("list", help="all tokens: id, name, created, expires, rights")
    change = actions.add_parser("set", help="give a token other rights in place of its own; its open streams end")
    change.add_argument("which", help="a name, for all of its tokens, or a token's id")
    for command in (add, change):
        command.add_argument(
            "--may",
            metavar="RIGHT",
            action="append",
            default=[],
            help="publish, subscribe (every topic), publish:PATTERN, subscribe:PATTERN (such as "
            "publish:topics/orders-* or publish:users/*), or metrics; several add up. "
            "Without one a token starts work and reads what is its caller's own",
        )
    revoke = actions.add_parser("revoke", help="a token no longer holds, and its streams end")
    revoke.add_argument("which", help="a name, for all of its tokens, or a token's id")


# `sseapp serve`


def _serve(options: argparse.Namespace) -> int:
    from sseapp import SSEApp, create_app
    from ssecore.server.runner import Hosted, serve

    given = {name: getattr(options, name) for name in ("host", "port", *OF_THE_SERVICE)}
    if options.app is None:
        settings = Settings.from_env(**given)
        return serve(create_app(settings), settings)
    for name in OF_THE_SERVICE:
        if given[name] is not None:
            option = f"--{name.replace('_', '-')}"
            text = f"{option} applies to the service only: set it in the code of {options.app}, Settings({name}=…)"
            raise SettingsError(text, field=name)
    settings = Settings.from_env(**given)  # of the runner; the program's streams have those that it made them with
    sys.path.insert(0, "")  # the folder that it is started in; a script has its own there
    app = load(options.app)
    return serve(app if isinstance(app, SSEApp) else Hosted(app), settings)


def load(target: str) -> Any:
    """The ASGI program that `package.module:name` names; where it is a function without parameters, what that returns.

    Raises `SettingsError` where there is none. What the module itself raises comes through.
    """
    module_name, colon, path = target.partition(":")
    if not module_name or not colon or not path:
        raise SettingsError(f"{target!r}: write MODULE:APP, such as my.module:app", field="app")
    try:
        found: Any = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the program itself lacks something
        text = f"no module named {error.name!r}: run this in the folder of your program, or install the package"
        raise SettingsError(text, field="app") from None
    for name in path.split("."):
        if not hasattr(found, name):
            raise SettingsError(f"{target!r}: {module_name} has no {path!r}", field="app")
        found = getattr(found, name)
    if inspect.isfunction(found) and not inspect.signature(found).parameters:
        found = found()
    if not callable(found):
        raise SettingsError(f"{target!r} is not an ASGI program: {type(found).__name__}", field="app")
    return found


# `sseapp token`


def _token(options: argparse.Namespace) -> int:
    """What a program may want goes to stdout, remarks go to stderr."""
    # No other setting is read: a wrong one is no reason to keep a token alive.
    given = os.environ.get("SSEAPP_TOKENS_FILE", "") if options.tokens_file is None else options.tokens_file
    if given.lower() in ("none", ""):
        raise SettingsError("no token file given: set SSEAPP_TOKENS_FILE, or pass --tokens-file")
    path = Path(given)
    if options.action == "add":
        _check_patterns(options.may)
        expiry = parse_expiry(options.expires) if options.expires is not None else None
        print(add_token(path, options.name, expiry, options.may))
        until = f"until {expiry.isoformat()}" if expiry is not None else "until it is revoked"
        rights = ", ".join(options.may) or "none besides starting work (see --may)"
        print(f"token for {options.name}, valid {until}; rights: {rights}", file=sys.stderr)
        print("it is not stored and won't be shown again: save it now", file=sys.stderr)
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
    """Refuse a pattern that fits none of the service's routes, such as `publish:orders-*`, which lacks `topics/`."""
    patterns = [right for right in may if ":" in right]
    if not patterns:
        return
    try:
        from handlers import ROUTES
    except ModuleNotFoundError:  # not the service's checkout: the routes are those of another program
        return
    kinds = sorted({route.may.partition("{")[0] for route in ROUTES if ":" in route.may})
    for right in patterns:
        if not right.startswith(tuple(kinds)):
            raise SettingsError(f"{right!r:.60} fits no route: a pattern begins with {', '.join(kinds)}", field="may")
