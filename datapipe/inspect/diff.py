"""Two runs over one input: what each kept that the other lost, and what both kept but labelled otherwise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group
from rich.table import Table

from datapipe.errors import QueryError
from datapipe.inspect.cards import cards_of, details_of
from datapipe.inspect.chance import rank
from datapipe.inspect.galleries import Best, Gallery, Pick
from datapipe.inspect.pages import html_page
from datapipe.inspect.sidecars import select
from datapipe.plan import read_run
from datapipe.schema import Outcome
from datapipe.shards import Store

SHOWN = 24
"""Images in a gallery of the page."""

SAME = "kept by both, the same"
CHANGED = "kept by both, labelled otherwise"
ONLY_A = "kept by A alone"
ONLY_B = "kept by B alone"
NEITHER = "lost by both"

_COLUMNS = "shard, row, key, outcome, stage, reason, detail, caption, entities"
Row = dict[str, Any]


@dataclass
class Difference:
    """`settings`: (key, in A, in B) of recipe and models; `fates`: rows by what became of them; `reasons`: of rows that
    one kept, why the other did not; `changes`: images kept by both, by what differs (several may); `picks`: by fate."""

    settings: list[tuple[str, str, str]]
    fates: Counter[str] = field(default_factory=Counter)
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)
    picks: dict[str, Best[tuple[Pick, ...]]] = field(
        default_factory=lambda: {ONLY_A: Best(SHOWN), ONLY_B: Best(SHOWN), CHANGED: Best(SHOWN // 2)}
    )

    def to_json(self) -> dict[str, Any]:
        return {
            "settings": {key: [a, b] for key, a, b in self.settings},
            "fates": dict(self.fates),
            "reasons": {f"{fate}: {reason}": rows for (fate, reason), rows in sorted(self.reasons.items())},
            "changes": dict(self.changes),
        }

    def __rich__(self) -> Group:
        settings = Table("setting", "A", "B", box=None, title="settings and models that differ", title_justify="left")
        for line in self.settings:
            settings.add_row(*line)
        fates = _counts("rows", [(fate, self.fates[fate]) for fate in (SAME, CHANGED, ONLY_A, ONLY_B, NEITHER)])
        reasons = _counts("why the other lost them", [(f"{f}: {r}", n) for (f, r), n in sorted(self.reasons.items())])
        changes = _counts("what differs where both kept the image", sorted(self.changes.items()))
        return Group(settings, "", fates, "", reasons, "", changes)


def diff(a: Store, b: Store, seed: int = 0) -> Difference:
    """Reads both once, side by side. Raises SddError, also when they are not of the same input."""
    runs = read_run(a), read_run(b)
    if runs[0].input != runs[1].input:
        raise QueryError(f"{a.root} and {b.root} were made from different inputs: their rows cannot be compared")
    told = [run.identity | {f"model of {stage}": model for stage, model in run.models.items()} for run in runs]
    keys = sorted(told[0].keys() | told[1].keys())
    difference = Difference(
        [(k, str(told[0].get(k)), str(told[1].get(k))) for k in keys if told[0].get(k) != told[1].get(k)]
    )
    for one, other in _side_by_side(a, b):
        _compare(difference, one, other, seed)
    return difference


def diff_page(a: Store, b: Store, difference: Difference) -> str:
    """The difference as a page with pictures: A's beside B's where both kept the image."""
    galleries = [
        Gallery(fate, tuple(pick for picks in best.items for pick in picks)) for fate, best in difference.picks.items()
    ]
    picks = [pick for gallery in galleries for pick in gallery.picks]
    cards = cards_of(a, picks, "A") | cards_of(b, picks, "B")
    fates = [(fate, difference.fates[fate]) for fate in (SAME, CHANGED, ONLY_A, ONLY_B, NEITHER)]
    return html_page(
        "diff",
        a=a.root,
        b=b.root,
        settings=difference.settings,
        fates=fates,
        reasons=[(f"{f}: {r}", n) for (f, r), n in sorted(difference.reasons.items())],
        changes=sorted(difference.changes.items()),
        galleries=galleries,
        cards=cards,
        details=details_of(cards.values()),
    )


def _side_by_side(a: Store, b: Store) -> Iterator[tuple[Row, Row]]:
    """The rows that both have, in order, however each is cut into shards."""
    others = select(b, _COLUMNS)
    other = next(others, None)
    for one in select(a, _COLUMNS):
        while other is not None and other["row"] < one["row"]:
            other = next(others, None)
        if other is not None and other["row"] == one["row"]:
            yield one, other


def _compare(difference: Difference, one: Row, other: Row, seed: int) -> None:
    kept = one["outcome"] == Outcome.KEPT.value, other["outcome"] == Outcome.KEPT.value
    changes = list(_changes(one, other)) if all(kept) else []
    fate = {(True, True): CHANGED if changes else SAME, (True, False): ONLY_A, (False, True): ONLY_B}.get(kept, NEITHER)
    difference.fates[fate] += 1
    difference.changes.update(changes)
    if fate in (ONLY_A, ONLY_B):
        shown, lost, dataset = (one, other, "A") if fate == ONLY_A else (other, one, "B")
        reason = f"{lost['stage']}/{lost['reason']}"
        difference.reasons[fate, reason] += 1
        picks: tuple[Pick, ...] = (_pick(shown, dataset, f"{reason} {lost['detail']}"),)
    else:
        picks = (_pick(one, "A", f"A: {', '.join(changes)}"), _pick(other, "B", "B"))
    if fate in difference.picks:
        difference.picks[fate].add(float(int(rank(one["key"], seed)[:12], 16)), one["row"], picks)


def _pick(row: Row, dataset: str, note: str) -> Pick:
    return Pick(row["shard"], row["row"], note=note, dataset=dataset)


def _changes(one: Row, other: Row) -> Iterator[str]:
    if one["caption"] != other["caption"]:
        yield "caption"
    before, after = (Counter(e["tag"] for e in row["entities"]) for row in (one, other))
    if before - after:
        yield "entities that B lost"
    if after - before:
        yield "entities that B gained"
    if before == after and [_shape(e) for e in one["entities"]] != [_shape(e) for e in other["entities"]]:
        yield "boxes or masks"


def _shape(entity: Row) -> tuple[Any, ...]:
    return entity["tag"], entity["box"], entity["mask"]


def _counts(title: str, lines: list[tuple[str, int]]) -> Table:
    table = Table(box=None, title=title, title_justify="left", show_header=False)
    for what, count in lines:
        table.add_row(what, f"{count:,}")
    return table
