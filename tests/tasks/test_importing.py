"""FLAN's and promptsource's templates become a task file's; what is not understood is refused by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from metalm.config.load import read_yaml
from metalm.errors import ConfigError, DataError
from metalm.project_files import project_root
from metalm.tasks.importing import Imported, into_task, read_flan, read_promptsource
from metalm.tasks.task_file import find_tasks

FLAN = '''
"""Invented templates."""
import os

os.abort()  # nothing is run
SPLITS = [1, 2]
PATTERNS = {
    "yes_or_no": [
        ("{text}\\n\\nSo, {question}?\\n\\n{options_}", "{answer}"),
        ("Write a passage on {title}.", "{text}"),
        ("{text!r} {question}", "{answer}"),
        ("{text} {speaker}", "{answer}"),
        ("A set: {{{title}}}", "{answer}"),
    ],
}
'''
PROMPTSOURCE = """
dataset: invented
templates:
  0001: !Template
    answer_choices: [Nope, Yep]
    id: 0001
    jinja: "{{ passage }}\\n{{question}}? ||| {{ answer_choices[label] }}"
    metadata: !TemplateMetadata
      choices_in_prompt: false
    name: "In slang…"
    reference: ''
  0002: !Template
    answer_choices: no ||| yes
    id: 0002
    jinja: '{{question}}? {{passage}} ||| {{answer_choices[label]}} '
    metadata: !TemplateMetadata {}
    name: in slang
    reference: ''
  0003: !Template
    answer_choices: null
    id: 0003
    jinja: '{% if label != -1 %}Ask {{"about"}} {{title}} ||| {{question}}{% endif %}'
    metadata: !TemplateMetadata {}
    name: Ask
    reference: ''
  0004: !Template
    id: 0004
    jinja: '{% if label %}{{question}}{% endif %} ||| {{answer_choices[label]}}'
    name: With a condition
  0005: !Template
    id: 0005
    jinja: '{{passage | upper}} ||| {{question}}'
    name: Filtered
  0006: !Template
    id: 0006
    jinja: '{{passage}}'
    name: No target
  0007: !Template
    id: 0007
    jinja: '{{passage ||| {{question}}'
    name: Not closed
"""


def imported(wordings: Any, **given: Any) -> Imported:
    content = read_yaml(find_tasks()["boolq"])
    return into_task(content, wordings, origin="new.yaml", **{"renamed": {}, "labels": [], **given})


def flan(tmp_path: Path) -> Path:
    (tmp_path / "templates.py").write_text(FLAN)
    return tmp_path / "templates.py"


def promptsource(tmp_path: Path, text: str = PROMPTSOURCE) -> Path:
    (tmp_path / "templates.yaml").write_text(text)
    return tmp_path / "templates.yaml"


def test_flans_pairs_become_templates(tmp_path: Path) -> None:
    made = imported(read_flan(flan(tmp_path), "yes_or_no"), renamed={"text": "passage"})
    first, turned, braced = made.content["templates"]
    assert first == {
        "id": "flan-1",
        "span": ["{passage}", "So, {question}?", "OPTIONS:", "{options}"],
        "plain": ["TARGET:"],
        "target": " {answer}",
    }
    assert (turned["use"], turned["target"]) == (["instruction_tuning"], " {passage}")
    assert braced["span"] == ["A set: {{{title}}}"]
    assert list(made.refused) == ["flan-3", "flan-4"]
    assert "{text} is not the name of a value alone" in made.refused["flan-3"]
    assert "it names speaker, and boolq has passage, title, question" in made.refused["flan-4"]


def test_promptsources_jinja_becomes_templates_with_its_words_for_answers(tmp_path: Path) -> None:
    made = imported(read_promptsource(promptsource(tmp_path)), labels=["false", "true"])
    slang, plain, ask = made.content["templates"]
    assert slang == {
        "id": "in-slang",
        "use": ["instruction_tuning"],
        "span": ["{passage}", "{question}?"],
        "target": " {answer|words_of_in_slang}",
    }
    assert made.content["maps"] == {"words_of_in_slang": {"no": "Nope", "yes": "Yep"}}
    assert plain == {"id": "in-slang-2", "span": ["{question}? {passage}"], "target": " {answer}"}
    assert ask["span"] == ["Ask about {title}"]
    assert (ask["use"], ask["target"]) == (["instruction_tuning"], " {question}")
    assert made.refused == {
        "with-a-condition": "{% if label %} is outside of {{name}} and {{answer_choices[name]}}",
        "filtered": "{{passage | upper}} is outside of {{name}} and {{answer_choices[name]}}",
        "no-target": "it has 0 ||| instead of one",
        "not-closed": "'{{passage' has braces that are not closed",
    }


def test_words_for_answers_need_the_order_of_labels(tmp_path: Path) -> None:
    made = imported(read_promptsource(promptsource(tmp_path)))
    assert [template["id"] for template in made.content["templates"]] == ["passage-question", "ask"]
    assert "give labels, the keys false, true in their order" in made.refused["in-slang"]


def test_files_of_other_forms_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no group 'maybe'; it has yes_or_no"):
        read_flan(flan(tmp_path), "maybe")
    (tmp_path / "templates.py").write_text("PATTERNS = {'a': open('b')}")
    with pytest.raises(DataError, match="not made of literals only"):
        read_flan(tmp_path / "templates.py", "a")
    with pytest.raises(DataError, match="python/object"):
        read_promptsource(promptsource(tmp_path, "templates: {a: !!python/object:os.abort {}}"))
    with pytest.raises(ConfigError, match="none of the templates can be taken\n  no-target: it has 0"):
        text = "templates: {a: !Template {name: no target, jinja: '{{passage}}'}}"
        imported(read_promptsource(promptsource(tmp_path, text)))


def test_the_tool_writes_a_task_file(tmp_path: Path) -> None:
    command = [sys.executable, str(project_root() / "tools/import_templates.py"), str(flan(tmp_path))]
    command += ["--group", "yes_or_no", "--task", "boolq", "--rename", "text=passage"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "new.yaml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path}/new.yaml: 3 template(s)\n"
    assert "left out flan-4: it names speaker" in done.stderr
    written = yaml.safe_load((tmp_path / "new.yaml").read_text())
    assert written["options"] == {"false": "no", "true": "yes"}
    assert [template["id"] for template in written["templates"]] == ["flan-1", "flan-2", "flan-5"]
