"""A text file of the newest figures for Prometheus: node exporter's textfile collector reads it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

from metalm.config.schema import PrometheusConfig
from metalm.run_folder import LOGS_NAME
from metalm.training.monitor.sink import About, Sink


class Prometheus(Sink):
    """Writes `metalm_RUN.prom`, replaced whole at each line.

    `loss/all` becomes `metalm_loss{run="demo",name="all"}`. A run that has ended leaves its last figures:
    `metalm_written_time_seconds` tells how old they are.
    """

    def __init__(self, config: PrometheusConfig, run_name: str, run_folder: Path) -> None:
        """Stand by."""
        self._path = (config.folder or run_folder / LOGS_NAME) / f"metalm_{run_name}.prom"
        self._run_name = run_name
        self._registry = CollectorRegistry()
        self._families: dict[str, Gauge] = {}
        self._step = self._gauge("step", "The last step with figures", ["run"]).labels(run_name)
        about_time = "When figures were last written, in seconds since 1970"
        self._written = self._gauge("written_time_seconds", about_time, ["run"]).labels(run_name)

    def write(self, step: int, figures: Mapping[str, float], about: About) -> None:
        for figure, value in figures.items():
            family, _, name = figure.partition("/")
            if family not in self._families:
                self._families[family] = self._gauge(family, f"The run's figures {family}/*", ["run", "name"])
            self._families[family].labels(self._run_name, name).set(value)
        self._step.set(step)
        self._written.set(time.time())
        write_to_textfile(str(self._path), self._registry)

    def _gauge(self, name: str, documentation: str, labels: list[str]) -> Gauge:
        return Gauge(f"metalm_{name}", documentation, labels, registry=self._registry)
