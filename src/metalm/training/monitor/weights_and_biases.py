"""Weights & Biases, online or to files that `wandb sync` uploads later.

It may neither end a run nor hold it up: whatever goes wrong in its package is logged once, and the run is
shown there no more. Where its server cannot be reached, the run is written to files. It takes nothing from
the process by itself: no command line, no code, no git address, no terminal output.
"""

from __future__ import annotations

import functools
import html
import logging
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from metalm.config import RunConfig
from metalm.config.schema import WandbConfig
from metalm.config.secrets import without_secrets
from metalm.run_folder import LOGS_NAME
from metalm.training.monitor.sink import About, Sink

logger = logging.getLogger(__name__)

_INIT_S, _FINISH_S = 20, 60
"""How long a start waits for the server, and an end for what is left to upload."""


def _at_no_risk(method: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(method)
    def attempt(self: WeightsAndBiases, *arguments: Any) -> None:
        if self._is_off:
            return
        try:
            method(self, *arguments)
        except Exception as error:  # of whatever kind: the package documents none
            self._is_off = True
            logger.warning("Weights & Biases shows this run no more: %s: %s", type(error).__name__, error)

    return attempt


class WeightsAndBiases(Sink):
    """Shows all starts of a run as one run, whose id is kept in its `logs`."""

    def __init__(self, settings: WandbConfig, config: RunConfig, run_folder: Path) -> None:
        """Stand by."""
        self._settings, self._config, self._run_folder = settings, config, run_folder
        self._run: Any = None
        self._is_off = False

    @_at_no_risk
    def begin(self, first_step: int) -> None:
        if self._run is None:
            run = self._begin_online() if self._settings.mode == "online" else None
            self._run = run or self._init("offline")
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")  # its own steps cannot go back

    @_at_no_risk
    def write(self, step: int, figures: Mapping[str, float], about: About) -> None:
        self._run.log({"step": step, **figures})

    @_at_no_risk
    def write_text(self, step: int, name: str, text: str) -> None:
        import wandb

        page = wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)
        self._run.log({"step": step, f"texts/{name}": page})

    @_at_no_risk
    def write_picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        import wandb

        self._run.log({"step": step, f"pictures/{name}": wandb.Image(pixels)})

    @_at_no_risk
    def write_audio(self, step: int, name: str, samples: np.ndarray, sampling_rate: int) -> None:
        import wandb

        self._run.log({"step": step, f"clips/{name}": wandb.Audio(samples, sample_rate=sampling_rate)})

    @_at_no_risk
    def close(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            run.finish()

    def _begin_online(self) -> Any:
        """The run at the server; None, and a warning, where it cannot be had."""
        import wandb

        try:
            wandb.setup(wandb.Settings(silent=True))
            if wandb.login(prompt=False, verify=False):
                run = self._init("online")
                logger.info("shown at %s", run.url)
                return run
            problem: Any = "no key; set WANDB_API_KEY, or call `wandb login`"
        except Exception as error:
            problem = error
            wandb.teardown()  # its service holds the run's id
        logger.warning("Weights & Biases cannot be used online, and the run is written to files: %s", problem)
        return None

    def _init(self, mode: Literal["online", "offline"]) -> Any:
        import wandb

        name = self._config.run.name
        settings = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            finish_timeout=_FINISH_S,
            init_timeout=_INIT_S,
            silent=True,
            stop_fn=lambda: logger.warning("Weights & Biases does not stop runs: use `metalm stop %s`", name),
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        return wandb.init(
            project=self._settings.project,
            entity=self._settings.entity,
            name=name,
            id=self._run_id(),
            resume="allow" if mode == "online" else None,
            dir=self._run_folder,
            config=without_secrets(self._config),
            mode=mode,
            settings=settings,
        )

    def _run_id(self) -> str:
        path = self._run_folder / LOGS_NAME / "wandb_id"
        if not path.exists():
            path.write_text(secrets.token_hex(8))
        return path.read_text()
