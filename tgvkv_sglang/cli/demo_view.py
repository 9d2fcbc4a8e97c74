"""How the demo looks on a terminal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..demo.questions import Question
from .client import Conversation, Reply
from .kept import Kept, bar, human_bytes


@dataclass
class Column:
    """One way to hold the chat. ``traces`` None: nothing is evicted. ``kept``: its latest selection."""

    title: str
    conversation: Conversation
    traces: Path | None
    kept: Kept | None = None

    def see(self, kept: Kept | None) -> None:
        """Remember a turn's selection; a turn without one goes on with the last."""
        if kept is not None:
            self.kept = kept
        elif self.kept is not None:
            self.kept = Kept(self.kept.per_layer, self.kept.vision, fresh=False)


@dataclass(frozen=True)
class Turn:
    reply: Reply
    right: bool
    kept: Kept | None


SECOND = " A second server keeps the first turn's choice."


def opening(picture: Path, retention: float, policy: str, random_model: bool, control: bool) -> RenderableType:
    lines = [
        f"Picture: [bold]{escape(str(picture))}[/bold] (open it and check the answers yourself)",
        f"The same chat is held on one SGLang server with 100 % and with {100 * retention:.3g} % of the picture's KV, "
        f"chosen by [bold]{escape(policy)}[/bold].{SECOND if control else ''}",
        "One picture proves little either way; docs/policies.md has the figures over many.",
    ]
    if random_model:
        lines.append("[bold red]The model's weights are random: its words mean nothing.[/bold red] Numbers of tokens "
                     "and bytes are real.")  # fmt: skip
    return Panel("\n".join(lines), title="tgvkv demo", expand=False)


def _answer(turn: Turn) -> Text:
    mark, style = ("✓ ", "green") if turn.right else ("✗ ", "red")
    return Text(mark + (turn.reply.text or "(nothing)"), style=style)


def _layers(kept: Kept | None) -> Text:
    if kept is None:
        return Text("all of every layer")
    most, out = max(kept.per_layer), Text()
    for layer, count in enumerate(kept.per_layer):
        out.append("  " if layer else "")
        out.append(bar(count, most), style="cyan")
        out.append(f" {count}")
    out.append(f"  of {kept.vision} each" + ("" if kept.fresh else " (as before)"))
    return out


def _bytes(kept: Kept | None, vision_units: int | None, unit_bytes: int) -> str:
    if kept is not None:
        before, after = (human_bytes(n * unit_bytes) for n in (kept.full_units, kept.units))
        return f"{before} → {after} ({kept.share:.1%})"
    if vision_units is None:
        return "all"
    return f"{human_bytes(vision_units * unit_bytes)} (100 %)"


def turn_table(
    number: int, question: Question, columns: list[Column], turns: list[Turn], unit_bytes: int
) -> RenderableType:
    """One turn: the question, the truth, and one column a way."""
    title = Text.assemble((f"{number}. {question.text}", "bold"), ("   truth: ", "dim"), question.answer)
    table = Table(show_header=True, header_style="bold", expand=False)
    table.add_column("")
    for column in columns:
        table.add_column(column.title, max_width=46)
    known = next((turn.kept for turn in turns if turn.kept is not None), None)
    units = known.full_units if known else None
    table.add_row("answer", *[_answer(turn) for turn in turns])
    table.add_row("prompt tokens", *[str(turn.reply.prompt_tokens) for turn in turns])
    table.add_row("from the radix cache", *[str(turn.reply.cached_tokens) for turn in turns])
    table.add_row("vision tokens kept by layer", *[_layers(turn.kept) for turn in turns])
    table.add_row("vision KV decode reads", *[_bytes(turn.kept, units, unit_bytes) for turn in turns])
    return Group(title, table, Text())


def closing(
    columns: list[Column], right: list[int], turns: int, directory: Path, random_model: bool
) -> RenderableType:
    lines = []
    if random_model:
        lines.append("The weights were random, so right and wrong mean nothing here.")
    for column, count in zip(columns, right, strict=True):
        lines.append(f"{escape(column.title)}: [bold]{count} of {turns}[/bold] answers right")
    lines.append("Full KV of the picture stays until memory is needed, so each question chose its own view.")
    lines.append(f"Traces: tgvkv inspect {escape(str(directory))}/traces-pressure/*.0.npz   Server stopped.")
    return Panel("\n".join(lines), title="in short", expand=False)
