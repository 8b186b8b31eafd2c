"""The rows that img2dataset could not download: its tars and tfrecords lack them, the parquet beside each has them."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow.parquet as pq

from datapipe.sources.columns import columns_of_keys, facts_of, not_downloaded
from datapipe.sources.input_files import InputFile, opened_as_it_is
from datapipe.sources.row_index import DamagedError, Found, InputRow
from datapipe.sources.settings import SourceSettings
from datapipe.sources.values import text_of

STATUS, DETAIL = "status", "error_message"


def failed_downloads(sidecar: InputFile | None, settings: SourceSettings, found: Found) -> Iterator[InputRow]:
    """A row with a problem for each that was not downloaded. A parquet that is not img2dataset's has none; a damaged
    one is noted, since the images can be read without it. Raises DamagedError of that if `settings.strict`."""
    if sidecar is None:
        return
    try:
        with opened_as_it_is(sidecar.url) as file:
            table = pq.ParquetFile(file)
            names = table.schema_arrow.names
            if not {"key", STATUS} <= set(names):
                return
            columns = columns_of_keys(tuple(names), settings)
            wanted = dict.fromkeys(n for n in (*columns.names, STATUS, DETAIL) if n in names)
            for batch in table.iter_batches(columns=list(wanted)):
                for record in batch.to_pylist():
                    status = text_of(record[STATUS])
                    if status != "success":
                        yield not_downloaded(facts_of(record, columns, settings), status, record.get(DETAIL))
    except DamagedError as error:
        if settings.strict:
            raise
        found.note(f"{error.about(sidecar.url, sidecar.name)}; rows that could not be downloaded are not counted")
