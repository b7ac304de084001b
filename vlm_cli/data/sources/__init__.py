"""Where records come from: files, shards and data sets, each as a `Source` of rows. `open_source` recognises the kind.

A row is what a source holds before anybody knows its format: `data.formats` turns it into a record.
"""

from vlm_cli.data.sources.base import Embedded, Row, Source
from vlm_cli.data.sources.opening import open_source

__all__ = ["Embedded", "Row", "Source", "open_source"]
