"""An audit of pairs: a person says of two cut-outs whether they are the same subject; precision follows, and what the
thresholds cost."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping

from rich.table import Table

from datapipe.inspect.audit import PICTURE_PX, Audit, Precision, Questioning, wilson_interval
from datapipe.inspect.browse import samples_at
from datapipe.inspect.galleries import TopK
from datapipe.inspect.pair_agreement import agreement
from datapipe.inspect.pair_galleries import Pair, read_pairs
from datapipe.inspect.picture_cards import Card, sample_card
from datapipe.inspect.random_choice import rank
from datapipe.schema.pairs import PAIRS, PairRejection
from datapipe.shards import Store, manifests
from subject_diffusion.errors import QueryError, ShardError

PAIR_AUDIT_FILE = "audit-pairs.json"
_ASKED = (PairRejection.AMBIGUOUS, PairRejection.UNLIKE, PairRejection.NOT_MUTUAL, PairRejection.OTHER_NOUN)
KINDS = ("pair", *(rejection.value for rejection in _ASKED))
"""Which candidates are asked about: the pairs, and those that a threshold refused."""


def question(pair: Pair) -> str:
    """Its name among the marks: "pair/0000000012/0/0000000031/2"."""
    return f"{pair['rejected'] or 'pair'}/{pair['key_a']}/{pair['entity_a']}/{pair['key_b']}/{pair['entity_b']}"


def choose_pairs(store: Store, number: int, seed: int) -> list[str]:
    """Questions about so many candidates, half of them pairs, the others from each kind alike, at random. Raises
    QueryError where nothing was found."""
    share = {kind: number - number // 2 if kind == "pair" else -(-(number // 2) // (len(KINDS) - 1)) for kind in KINDS}
    chosen = {kind: TopK[str](max(1, many)) for kind, many in share.items()}
    for position, pair in enumerate(read_pairs(store)):
        name = question(pair)
        if (best := chosen.get(name.partition("/")[0])) is not None:
            best.add(float(int(rank(name, seed)[:12], 16)), position, name)
    asked = [name for kind in KINDS for name in chosen[kind].items]
    if not asked:
        raise QueryError(f"{store.root}: {PAIRS} holds nothing to ask about; choose other settings of `sdd pairs`")
    # Mixed, so that nobody learns what the machine thought.
    return sorted(asked, key=lambda name: rank(name, seed + 1))


def open_pair_audit(store: Store, number: int, seed: int) -> Audit:
    """The one that was begun beside the dataset, or a new one. Raises QueryError when the one that was begun is of
    other pairs, or asks for other ones."""
    if not store.exists(PAIRS):
        raise QueryError(f"{store.root}: no {PAIRS}; `sdd pairs {store.root}` finds pairs")
    new = Audit(number, seed, hashlib.sha256(store.read(PAIRS)).hexdigest())
    if not store.exists(PAIR_AUDIT_FILE):
        return new
    where = f"{store.root}/{PAIR_AUDIT_FILE}"
    try:
        begun = Audit(**json.loads(store.read(PAIR_AUDIT_FILE)))
    except (ValueError, TypeError):
        raise ShardError(f"{where}: holds no marks of `sdd audit --pairs`; remove it to start one") from None
    for what, words in {"dataset": "other pairs", "images": "another number", "seed": "another seed"}.items():
        if getattr(begun, what) != getattr(new, what):
            raise QueryError(f"{where}: its marks are of {words}; go on with those, or remove it")
    return begun


class PairQuestioning(Questioning):
    """An audit of pairs that is being answered."""

    file = PAIR_AUDIT_FILE

    def __init__(self, store: Store, number: int, seed: int) -> None:
        """Raises QueryError, see `open_pair_audit` and `choose_pairs`."""
        self._store = store
        self.audit = self._open(number, seed)
        self.asked = choose_pairs(store, number, seed)
        self._known = frozenset(self.asked)

    def _open(self, images: int, seed: int) -> Audit:
        return open_pair_audit(self._store, images, seed)

    @property
    def described(self) -> str:
        """How much there is to answer."""
        return f"{len(self.asked):,} candidates"

    @functools.cached_property
    def _cards(self) -> dict[str, Card]:
        rows = sorted({int(key) for name in self.asked for key in name.split("/")[1::2]})
        places = []
        for manifest in manifests(self._store, "shard"):
            own = range(manifest.first_row, manifest.first_row + manifest.rows)
            places += [(manifest.index, row) for row in rows if row in own]
        return {s.key: sample_card(s, s.key, PICTURE_PX) for s in samples_at(self._store, places)}


def pair_precisions(marks: Mapping[str, bool]) -> dict[str, Precision]:
    """How many of each kind were called the same subject, as if candidates were independent."""
    found = {}
    for kind in KINDS:
        given = [same for name, same in marks.items() if name.partition("/")[0] == kind]
        low, high = wilson_interval(sum(given), len(given)) if given else (float("nan"), float("nan"))
        found[kind] = Precision(len(given), sum(given), low, high)
    return found


def pair_precision(store: Store) -> str:
    """What the dataset's own identities, and people, said of the pairs, in words; "" where neither did."""
    given = agreement(store)
    said = [] if given is None else [f"{given}."]
    if store.exists(PAIR_AUDIT_FILE):
        p = pair_precisions(Audit(**json.loads(store.read(PAIR_AUDIT_FILE))).marks)["pair"]
        if p.marked:
            said.append(
                f"By audit: precision {p.share:.3f} (95 %: {p.low:.3f} to {p.high:.3f}), of {p.marked:,} pairs."
            )
    return " ".join(said)


def pair_precision_table(audit: Audit, asked: int) -> Table:
    title = f"{len(audit.marks):,} of {asked:,} questions answered"
    table = Table("candidates", "marked", "same subject", "share", "95 %", box=None, title=title, title_justify="left")
    for kind, p in pair_precisions(audit.marks).items():
        shown = (f"{p.share:.3f}", f"{p.low:.3f} to {p.high:.3f}") if p.marked else ("", "")
        table.add_row("pairs" if kind == "pair" else kind, f"{p.marked:,}", f"{p.right:,}", *shown)
    return table
