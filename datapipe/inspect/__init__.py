"""Looking into shards: counts for the terminal, and pictures."""

from datapipe.inspect.draw import contact_sheet, draw_sample
from datapipe.inspect.summary import Summary, funnel, summarise, tables

__all__ = ["Summary", "contact_sheet", "draw_sample", "funnel", "summarise", "tables"]
