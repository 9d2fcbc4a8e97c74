"""``tgvkv chat``: a terminal chat about an image file with a running server."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.markup import escape

from .client import ChatError, Conversation, image_part


def chat(args: argparse.Namespace) -> int:
    """Ask until an empty line, Ctrl-D or Ctrl-C."""
    console = Console()
    image_part(args.image)  # a bad file is told before the first question is typed
    custom = {} if args.retention is None else {"tgvkv_retention": args.retention}
    talk = Conversation(args.base_url.rstrip("/"), args.image, custom, args.model, args.max_tokens)
    console.print(f"About {escape(str(args.image))}. An empty line or Ctrl-D ends the chat.", style="dim")
    while True:
        try:
            question = console.input("[bold]you > [/bold]").strip()
        except EOFError:
            question = ""
        if not question:
            return 0
        try:
            with console.status("thinking"):
                reply = talk.ask(question)
        except ChatError as error:
            console.print(f"[red]{escape(str(error))}[/red]")
            if not talk.messages:
                return 1
            continue
        console.print(f"[bold green]it  > [/bold green]{escape(reply.text)}")
        console.print(f"      {reply.prompt_tokens} prompt tokens, {reply.cached_tokens} from the cache", style="dim")
