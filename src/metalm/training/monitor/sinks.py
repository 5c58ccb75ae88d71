"""The sinks of a run, by its `monitor.sinks`, as one sink that no full disk stops.

A sink's module is imported where the run has the sink: TensorBoard alone takes a second.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from metalm.config import RunConfig
from metalm.errors import ConfigError
from metalm.training.monitor.json_lines import JsonLines
from metalm.training.monitor.sink import About, Sink
from metalm.training.monitor.terminal import Terminal

logger = logging.getLogger(__name__)

_PACKAGES = {"wandb": "wandb", "prometheus": "prometheus_client"}
"""What a sink needs beside MetaLM's own dependencies; the extra has the sink's name."""


def check_sinks(config: RunConfig) -> None:
    """See that the packages of the run's sinks are installed.

    Raises:
        ConfigError: one is not.
    """
    for name, package in _PACKAGES.items():
        if getattr(config.monitor.sinks, name) is not None and find_spec(package) is None:
            raise ConfigError(
                f"monitor.sinks.{name} needs the package {package}, which is not installed: "
                f"pip install 'metalm[{name}]', or take monitor.sinks.{name} out"
            )


def open_sinks(config: RunConfig, run_folder: Path, restarts: int) -> AllSinks:
    """What shows the run: the terminal and the metrics file always, others as the config says."""
    sinks: list[Sink] = [Terminal(config.training.steps), JsonLines(run_folder, restarts)]
    wanted = config.monitor.sinks
    if wanted.tensorboard:
        from metalm.training.monitor.tensorboard import TensorBoard

        sinks.append(TensorBoard(config, run_folder))
    if wanted.wandb is not None:
        from metalm.training.monitor.weights_and_biases import WeightsAndBiases

        sinks.append(WeightsAndBiases(wanted.wandb, config, run_folder))
    if wanted.prometheus is not None:
        from metalm.training.monitor.prometheus import Prometheus

        sinks.append(Prometheus(wanted.prometheus, config.run.name, run_folder))
    return AllSinks(sinks)


class AllSinks(Sink):
    """Passes everything on to each of its sinks.

    What cannot be written is logged once and given up: the training is worth more than its figures.
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        """With no sinks, nothing is shown."""
        self._sinks = list(sinks)
        self._failed: set[int] = set()
        self._first_step = 0
        self._unbegun: set[int] = set()
        """Those that have not begun at `_first_step`, and so hold what is superseded."""

    def begin(self, first_step: int) -> None:
        self._first_step = first_step
        self._unbegun = set(range(len(self._sinks)))
        self._each(lambda sink: None)

    def write(self, step: int, figures: Mapping[str, float], about: About) -> None:
        self._each(lambda sink: sink.write(step, figures, about))

    def write_text(self, step: int, name: str, text: str) -> None:
        self._each(lambda sink: sink.write_text(step, name, text))

    def write_picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        self._each(lambda sink: sink.write_picture(step, name, pixels))

    def write_audio(self, step: int, name: str, samples: np.ndarray, sampling_rate: int) -> None:
        self._each(lambda sink: sink.write_audio(step, name, samples, sampling_rate))

    def say(self, line: str) -> None:
        self._each(lambda sink: sink.say(line))

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()

    def _each(self, show: Callable[[Sink], None]) -> None:
        for number, sink in enumerate(self._sinks):
            try:
                if number in self._unbegun:
                    sink.begin(self._first_step)
                    self._unbegun.discard(number)
                elif number in self._failed:
                    sink.reopen()
                show(sink)
            except OSError as error:
                if number not in self._failed:
                    logger.error("figures cannot be written: %s; the training goes on", error)
                self._failed.add(number)
            else:
                self._failed.discard(number)
