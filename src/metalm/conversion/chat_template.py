"""The chat template of an exported model: messages to a prompt, laid out as `data.documents.chats` does.

Who reads what is as `usual_readers` says. In a run without a source of examples, the encoder of an image or a
clip reads the text behind it, too, if it reads text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from metalm.config import RunConfig
from metalm.config.model_schema import MEDIA_SECTIONS, TEXT
from metalm.data.documents.chats import ANSWERING_ROLES, BLANKS
from metalm.data.usual_readers import usual_readers
from metalm.modalities.boxes import GRID

_TEMPLATE = """\
{%- set joined, encoded, media, answering, blanks = JOINED, ENCODED, MEDIA, ANSWERING, BLANKS -%}
{%- set grid = GRID -%}
{%- macro box(c) -%}
{%- if not (c | length == 4 and -1e-6 <= c[0] < c[2] <= 1 + 1e-6 and -1e-6 <= c[1] < c[3] <= 1 + 1e-6) -%}
{{- raise_exception('a box is left, top, right and bottom, as shares of the image from 0 to 1') -}}
{%- endif -%}
{%- set b = namespace(first=[], last=[]) -%}
{%- for low, high in [[c[0], c[2]], [c[1], c[3]]] -%}
{%- set first, last = (low * grid) | round | int, (high * grid) | round | int -%}
{%- set first = first if first < last else [(low * grid) | int, grid - 1] | min -%}
{%- set b.first, b.last = b.first + [first], b.last + [[last, first + 1] | max] -%}
{%- endfor -%}
{{- '<box> ' ~ (b.first + b.last) | join(' ') ~ ' </box>' -}}
{%- endmacro -%}
{%- macro say(items, is_answer, is_last) -%}
{%- set m = namespace(media=[], texts=[], runs=[], text='', turn=-1) -%}
{%- for item in items -%}
{%- if item[1] == 'text' -%}{%- set m.texts = m.texts + [item] -%}
{%- else -%}{%- set m.media = m.media + [item] -%}{%- endif -%}
{%- endfor -%}
{%- for item in (m.media + m.texts if m.media | length == 1 else items) + [[-1, '', '']] -%}
{%- if item[1] == 'text' -%}
{%- if item[0] != m.turn and m.text.strip(blanks) and item[2].strip(blanks) -%}
{%- set m.text = m.text.rstrip(blanks) + '\\n\\n' + item[2].lstrip(blanks) -%}
{%- else -%}{%- set m.text = m.text + item[2] -%}{%- endif -%}
{%- if item[2].strip(blanks) -%}{%- set m.turn = item[0] -%}{%- endif -%}
{%- else -%}
{%- if m.text.strip(blanks) -%}{%- set m.runs = m.runs + [['text', m.text.strip(blanks)]] -%}{%- endif -%}
{%- if item[1] -%}{%- set m.runs = m.runs + [[item[1], '']] -%}{%- endif -%}
{%- set m.text, m.turn = '', -1 -%}
{%- endif -%}
{%- endfor -%}
{%- for run in m.runs -%}
{%- set before = m.runs[loop.index0 - 1][0] if not loop.first else 'text' -%}
{%- if run[0] != 'text' -%}
{%- if run[0] in joined and not loop.last and m.runs[loop.index0 + 1][0] == 'text' -%}
{{- '<span><' + run[0] + '>' -}}
{%- else -%}{{- '<' + run[0] + '>' -}}{%- endif -%}
{%- elif is_answer -%}{{- run[1] -}}
{%- elif before in joined -%}{{- run[1] + '</span>' -}}
{%- elif encoded -%}{{- '<span>' + run[1] + '</span>' -}}
{%- else -%}{{- run[1] + ('\\n\\n' if loop.last else '') -}}{%- endif -%}
{%- endfor -%}
{%- if is_answer and not is_last -%}{{- '\\n\\n' -}}{%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(items=[], is_answer=false) -%}
{%- for message in messages -%}
{%- set turn, is_answer = loop.index0, message['role'] in answering -%}
{%- if not loop.first and is_answer != ns.is_answer -%}
{{- say(ns.items, ns.is_answer, false) -}}
{%- set ns.items = [] -%}
{%- endif -%}
{%- set ns.is_answer = is_answer -%}
{%- set content = message['content'] or '' -%}
{%- for part in ([{'type': 'text', 'text': content}] if content is string else content) -%}
{%- if part['type'] == 'text' -%}
{%- set ns.items = ns.items + [[turn, 'text', part['text']]] -%}
{%- elif part['type'] == 'box' -%}{%- set ns.items = ns.items + [[turn, 'text', box(part['box'])]] -%}
{%- elif part['type'].removeprefix('input_').removesuffix('_url') in media -%}
{%- set ns.items = ns.items + [[turn, part['type'].removeprefix('input_').removesuffix('_url'), '']] -%}
{%- endif -%}
{%- endfor -%}
{%- endfor -%}
{{- say(ns.items, ns.is_answer, true) -}}
"""


def chat_template(config: RunConfig) -> str:
    """The content of chat_template.jinja."""
    readers = usual_readers(config)
    values = {
        "JOINED": json.dumps(_joined(config, readers)),
        "ENCODED": json.dumps(TEXT in readers),
        "MEDIA": json.dumps(MEDIA_SECTIONS),
        "ANSWERING": json.dumps(ANSWERING_ROLES),
        "BLANKS": json.dumps(BLANKS),
        "GRID": json.dumps(GRID),
    }
    template = _TEMPLATE
    for name, value in values.items():
        template = template.replace(name, value)
    return template


def _joined(config: RunConfig, readers: Mapping[str, str]) -> list[str]:
    """Modalities whose encoder reads the text behind an image or a clip together with it."""
    media = {modality: name for modality, name in readers.items() if modality != TEXT}
    if config.data.example_source is not None:
        return [modality for modality, name in media.items() if name == readers.get(TEXT)]
    return [modality for modality, name in media.items() if config.model.encoders[name].max_text_positions]
