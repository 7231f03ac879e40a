"""Figures as text that Prometheus reads.

Imported at the first scrape: `prometheus_client` brings a web server along and takes 40 ms, which a gateway that has to
be back at once does not spend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from gateway.families import FAMILIES, OPENMETRICS, PLAIN, Family, Figures, Values
from gateway.tally import Histogram

_WRITERS: Final[Mapping[str, Callable[[Collector], bytes]]] = {
    PLAIN: generate_latest,
    OPENMETRICS: openmetrics.generate_latest,
}


class _Now(Collector):
    """The metrics of one moment."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        """Yield every metric that there is a value of."""
        for family in FAMILIES:
            values = self._figures[family.name]
            if isinstance(values, Histogram):
                buckets = values.buckets()
                yield HistogramMetricFamily(family.name, family.doc, buckets=buckets, sum_value=values.sum)
            elif values is not None:
                yield _metric(family, values)


def _metric(family: Family, values: Values) -> Metric:
    make = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    found = make(family.name, family.doc, labels=family.labels)
    by_label: Mapping[Any, float] = values if isinstance(values, Mapping) else {(): values}
    for key, value in {**dict.fromkeys(family.known, 0), **by_label}.items():
        found.add_metric(key if isinstance(key, tuple) else (key,), value)
    return found


def render(figures: Figures, media: str) -> bytes:
    """Return the figures as `media`, one of PLAIN or OPENMETRICS. The registry lives for this one answer."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Now(figures))
    return _WRITERS[media](registry)
