"""`metalm report RUN`: one HTML page of a run, complete in itself, for people who were not there."""

from __future__ import annotations

import base64
import html
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from metalm.checkpoint.names import CONFIG_NAME
from metalm.config.load import load_resolved_config
from metalm.config.secrets import redacted
from metalm.errors import ConfigError
from metalm.objectives import build_objective
from metalm.operations.history import read_attempts
from metalm.operations.report_curves import draw_curves
from metalm.operations.status import fields_of
from metalm.outputs import require_file_place, writing
from metalm.regular_files import replace_file
from metalm.run_ends import all_ends
from metalm.run_metrics import read_metrics

MOST_SAMPLES = 12
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em }
h1 { margin-bottom: 0 } h2 { border-bottom: 1px solid #ccc; margin-top: 2em }
table { border-collapse: collapse }
td, th { padding: .2em .8em .2em 0; text-align: left; vertical-align: top }
td { white-space: pre-wrap } th { font-weight: 600; color: #555 }
.curves, .samples { display: flex; flex-wrap: wrap; gap: 12px } .curves svg { width: 520px; height: auto }
figure { margin: 0; width: 240px } figure img { width: 100%; image-rendering: pixelated }
pre { background: #f5f5f5; padding: .8em; overflow-x: auto; white-space: pre-wrap }
"""


def write_report(run_folder: Path, out: Path | None = None) -> Path:
    """Write the page of a run, finished or not.

    Args:
        run_folder: of the run.
        out: the page; default: `report.html` in the run's folder.

    Returns:
        Where it was written.

    Raises:
        ConfigError: there is no run in this folder, matplotlib is not installed, or the page cannot be
            written.
    """
    out = out or run_folder / "report.html"
    state = fields_of(run_folder, time.time())
    advice = "name a file in a folder that you may write with --out"
    require_file_place(out, advice)
    config = _config(run_folder)
    curves = draw_curves(read_metrics(run_folder), _loss_unit(run_folder))
    sections = [
        ("Result", _table(state.items())),
        ("Curves", f'<div class="curves">{"".join(curves.values())}</div>' if curves else None),
        ("Samples", _samples(run_folder / "tensorboard")),
        ("Layout", _table(_layout(config))),
        ("Starts and ends", _history(run_folder)),
        ("Versions", _table(_flat(config.get("provenance") or {}))),
        ("Config", f"<details><summary>all keys</summary><pre>{_escaped(_dumped(config))}</pre></details>"),
    ]
    name = _escaped(run_folder.resolve().name)
    written = time.strftime("%Y-%m-%d %H:%M")
    body = "".join(f"<h2>{title}</h2>\n{content}\n" for title, content in sections if content)
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}: a run of MetaLM</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>{name}</h1>\n<p>a run of MetaLM, as of {written}</p>\n"
        f"{body}</body></html>\n"
    )
    with writing(out, advice):
        replace_file(out, page)
    return out


def _config(run_folder: Path) -> dict[str, Any]:
    path = run_folder / CONFIG_NAME
    content = yaml.safe_load(path.read_text()) if path.is_file() else {}
    return redacted(content) if isinstance(content, dict) else {}


def _loss_unit(run_folder: Path) -> str:
    """Of the run's objective; none is told where the config is not one of this version."""
    try:
        return build_objective(load_resolved_config(run_folder / CONFIG_NAME)).loss_unit
    except ConfigError:
        return ""


def _layout(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for section in ("parallel", "deepspeed"):
        yield from _flat(config.get(section) or {}, f"{section}.")
    for key in ("global_batch_size", "micro_batch_size", "precision", "steps"):
        if key in (config.get("training") or {}):
            yield f"training.{key}", config["training"][key]
    if "sequence_length" in (config.get("data") or {}):
        yield "data.sequence_length", config["data"]["sequence_length"]


def _history(run_folder: Path) -> str | None:
    rows = [
        (
            _when(one.began),
            f"job {one.job} started",
            f"{one.ranks} ranks on {one.nodes}, step {one.first_step:,}",
        )
        for one in read_attempts(run_folder)
        if one.ranks
    ]
    rows += [
        (
            _when(end.time),
            f"ended with {end.code}",
            end.cause + ("" if end.step is None else f", step {end.step:,}"),
        )
        for end in all_ends(run_folder)
    ]
    return _rows(sorted(rows)) if rows else None


def _samples(folder: Path) -> str | None:
    """The newest images and texts that the run has shown in TensorBoard."""
    if not folder.is_dir():
        return None
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(
        str(folder), size_guidance={"images": 1, "tensors": 1, "scalars": 1, "audio": 1}
    )
    events.Reload()
    figures = []
    for tag in sorted(events.Tags()["images"])[:MOST_SAMPLES]:
        image = events.Images(tag)[-1]
        data = base64.b64encode(image.encoded_image_string).decode()
        caption = f"<figcaption>{_escaped(tag)}, step {image.step:,}</figcaption>"
        figures.append(f'<figure><img alt="" src="data:image/png;base64,{data}">{caption}</figure>')
    texts = []
    for tag in [tag for tag in sorted(events.Tags()["tensors"]) if tag.endswith("/text_summary")][
        :MOST_SAMPLES
    ]:
        event = events.Tensors(tag)[-1]
        text = b"\n".join(event.tensor_proto.string_val).decode(errors="replace")
        title = f"{_escaped(tag.removesuffix('/text_summary'))}, step {event.step:,}"
        texts.append(f"<details><summary>{title}</summary><pre>{_escaped(text)}</pre></details>")
    return f'<div class="samples">{"".join(figures)}</div>{"".join(texts)}' if figures or texts else None


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _table(pairs: Iterable[tuple[str, Any]]) -> str:
    rows = "".join(f"<tr><th>{_escaped(name)}</th><td>{_escaped(value)}</td></tr>" for name, value in pairs)
    return f"<table>{rows}</table>"


def _rows(rows: Iterable[tuple[str, ...]]) -> str:
    lines = ("".join(f"<td>{_escaped(cell)}</td>" for cell in row) for row in rows)
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _dumped(config: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)


def _escaped(value: Any) -> str:
    return html.escape(str(value))
