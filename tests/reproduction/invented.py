"""A task of a few invented records."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

_TASK = """
task: invented
cluster: invented
data:
  folder: invented
  reader: jsonl
  files: {files}
  fields: {{text: text, label: label}}
options: {{"yes": "yes", "no": "no"}}
answer: label
templates:
  - id: plain
    span: ["Text: {{text}}"]
    plain: ["Answer:"]
    target: " {{answer}}"
decode: {{max_new_tokens: 4}}
metrics: [exact_match]
evaluated_on: test
"""


def write_task(data: Path, texts: Mapping[str, Sequence[str]]) -> Path:
    """Write `invented.yaml` and its records, by split, below a folder of data; good ones are "yes"."""
    folder = data / "invented"
    folder.mkdir(parents=True)
    for split, some in texts.items():
        made = (
            {"text": text, "label": "yes" if text.startswith("good") else "no", "group": f"{split} {text}"}
            for text in some
        )
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in made))
    path = data / "invented.yaml"
    path.write_text(_TASK.format(files=json.dumps({split: f"{split}.jsonl" for split in texts})))
    return path
