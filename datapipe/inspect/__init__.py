"""Looking into shards: tables for the terminal, and pictures."""

from datapipe.inspect.browse import Query, inspect
from datapipe.inspect.draw import contact_sheet, draw_sample
from datapipe.inspect.summary import Summary, Totals, count_manifests, summarize

__all__ = ["Query", "Summary", "Totals", "contact_sheet", "count_manifests", "draw_sample", "inspect", "summarize"]
