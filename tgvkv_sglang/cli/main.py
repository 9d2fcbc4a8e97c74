"""The ``tgvkv`` command. Each subcommand is imported when it is used, so that help is instant."""

from __future__ import annotations

import argparse
import sys
from typing import Sequence

from .. import __version__
from ..errors import TgvkvError


def _serve(args: argparse.Namespace, rest: list[str]) -> int:
    from .serve import serve

    return serve(rest)


def _doctor(args: argparse.Namespace, rest: list[str]) -> int:
    if args.models:
        from .models import show_models

        return show_models()
    from .doctor import doctor

    return doctor()


def _demo(args: argparse.Namespace, rest: list[str]) -> int:
    from .demo import demo

    return demo(args)


def _chat(args: argparse.Namespace, rest: list[str]) -> int:
    from .chat import chat

    return chat(args)


def _inspect(args: argparse.Namespace, rest: list[str]) -> int:
    from .inspect_trace import inspect_trace

    return inspect_trace(args)


def _add_demo(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("demo", help="a picture chat on a real server on this machine's CPU")
    parser.add_argument("--turns", type=int, default=6, help="questions about the picture, at least 1 (default 6)")
    parser.add_argument("--retention", type=float, default=0.05, help="kept share of the vision KV (default 0.05)")
    parser.add_argument("--seed", type=int, default=0, help="another seed is another picture (default 0)")
    parser.add_argument("--random-model", action="store_true", help="random weights instead of the bundled ones")
    parser.add_argument(
        "--policy", default="peak-last", help="how vision tokens are scored, see docs/policies.md (default %(default)s)"
    )
    parser.add_argument(
        "--control",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="a third column that keeps the first turn's choice for all turns (a second server)",
    )
    parser.add_argument("--out", default="tgvkv-demo", help="directory for picture, traces and log (tgvkv-demo)")
    parser.set_defaults(run=_demo)


def _add_chat(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("chat", help="chat about an image file with a running server")
    parser.add_argument("image", help="image file (PNG, JPEG, ...)")
    parser.add_argument("--base-url", default="http://127.0.0.1:30000", help="the server (default %(default)s)")
    parser.add_argument("--model", default="default", help="model name sent with each request")
    parser.add_argument("--retention", type=float, help="custom_params tgvkv_retention (default: the server's)")
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.set_defaults(run=_chat)


def _add_inspect(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("inspect", help="summarise a selection trace, or draw it")
    parser.add_argument("traces", nargs="+", metavar="TRACE", help="a .npz file of --tgvkv-trace-dir")
    parser.add_argument("--image", action="append", default=[], help="image file to draw on (once per image)")
    parser.add_argument("-o", "--out", help="write one trace's kept tokens per layer as a PNG (needs matplotlib)")
    parser.set_defaults(run=_inspect)


def build_parser() -> argparse.ArgumentParser:
    """The parser of every subcommand but ``serve``, whose arguments are SGLang's."""
    parser = argparse.ArgumentParser(
        prog="tgvkv", description="Text-grounded KV eviction for vision-language models in SGLang."
    )
    parser.add_argument("--version", action="version", version=f"tgvkv-sglang {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", add_help=False, help="'sglang serve' with tgvkv and this machine's defaults")
    serve.set_defaults(run=_serve)
    checks = commands.add_parser("doctor", help="check that everything fits together here")
    checks.add_argument("--models", action="store_true", help="print which models can be served and which were tried")
    checks.set_defaults(run=_doctor)
    _add_demo(commands)
    _add_chat(commands)
    _add_inspect(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status (130 after Ctrl-C)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["serve"]:  # argparse would claim abbreviations of SGLang's own flags
        args, rest = argparse.Namespace(run=_serve), argv[1:]
    else:
        args, rest = build_parser().parse_args(argv), []
    try:
        return args.run(args, rest)
    except TgvkvError as error:
        print(f"tgvkv: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ntgvkv: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
