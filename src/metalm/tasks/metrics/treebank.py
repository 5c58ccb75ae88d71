"""Words of captions as COCO's evaluation has them: Penn Treebank tokens in lower case, without punctuation.

COCO's evaluation runs Stanford's tokenizer in Java. This one has its rules for English (clitics, hyphens,
numbers, abbreviations, brackets, tags, faces), found by comparing outputs: of 930,000 words of dictionary
glosses, reviews, editorials and tweets about 50 differ (rare abbreviations, telephone numbers, slang).

Two habits of the original make words that one would not expect, and count in every published number: brackets
become -lrb-, -rrb- and so on and stay, and so do runs such as ?!.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_DROPPED = frozenset(["''", "'", "``", "`", '"', ".", "?", "!", ",", ":", "-", "--", "...", ";"])

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}

_WRITTEN = (
    dict.fromkeys("\u2019\x92", "'")
    | dict.fromkeys("\u2018\u201b\u2039\u203a\u201c\u201d\xab\xbb\x91\x93\x94", ' " ')
    | dict.fromkeys("\u2013\u2014\u2015\x96\x97", " -- ")
    | dict.fromkeys("\xad\u2010\u2011", "")
    | dict.fromkeys("€¤\x80", " $ ")
    | {"£": " # ", "¢": " cents ", "…": " ... ", "²": " ² ", "³": " ³ ", "¹": " ¹ ", "&amp;": "&"}
    | {"½": " 1/2 ", "¼": " 1/4 ", "¾": " 3/4 ", "⅓": " 1/3 ", "⅔": " 2/3 "}
)
"""Signs that the Penn Treebank writes otherwise, with curly quotes, long dashes and special hyphens."""
_TO_WRITE = re.compile("|".join(map(re.escape, _WRITTEN)))

_ABBREVIATIONS = """
    adj adm adv al ala alex apr ariz assn assoc asst atty aug ave bhd bldg blvd brig bros calif capt cf cie
    cmdr co col colo comdr conn corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext feb fla fri
    ft ga gen govs? hon inc ind insp intl invt jan jos jr jul jun kans? ky lieut lt ltd maj mar md messrs mfg
    mich minn mlle mme mo mon mont mr mrs ms msgr mt mtg natl neb nev nov oct okla penn pfc ph plc ppt[ey]
    ppty pres profs? ptes? ptys? pvt rd reps? rev rt sens? seq sept? sfc sgt spc sq sr st ste supt sys tel
    tenn thu thurs treas tues? univ va vs vt wed wisc? wm wyo
"""
_CAPITAL_ABBREVIATIONS = (
    "A(?i:rk|z) D(?i:el) I(?i:ll) L(?i:a) M(?i:ass|iss) O(?i:re) P(?i:a) T(?i:ex) W(?i:ash)"
)
"""Keep their period with a capital only."""
_BEFORE_NUMBERS = "art ca figs? nos? op pp prop"
"""Keep their period before a number only."""
_STARTS = """
    The It He She They We You In A An This That These There When While If But At Her Their One Some Many As
    Here So Then Now After Our What However Such
"""
"""Before one of these a period after a single letter ends a sentence."""


def _one_of(words: str) -> str:
    return "(?:" + "|".join(words.split()) + ")"


_LETTER = r"(?:[^\W\d_][\u0300-\u036f]*)"
_NO_LETTER = r"(?![^\W\d_])"
_PART = rf"(?:{_LETTER}|\d)+"
_INITIALS = r"(?:[A-Za-z]\.){2,}"
_FIRST_PART = rf"(?:{_INITIALS}(?=-)|{_PART})"
_HYPHENED = rf"{_FIRST_PART}(?:-(?:{_INITIALS}|{_PART}))*"
_NUMBER = r"(?:\d*(?:[.,:]\d+)+|\d+)"
_URL_REST = r"[^\s<>\"]*[^\s<>\".,;:!?'()]"

_PATTERNS = [
    re.compile(pattern)
    for pattern in (
        # Words that are two, before patterns that find as much
        r"(?i:(can)(not)|(gim)(me)|(gon)(na)|(got)(ta)|(lem)(me)|(wan)(na))(?!\w)",
        # Tags, addresses, names, faces
        r"<(?:!--|[!?/]?[A-Za-z])[^<>]*>",
        rf"https?://{_URL_REST}",
        rf"(?:[\w-]+\.)+(?:com|net|org|edu)(?:/{_URL_REST})?(?!\w)",
        r"[A-Za-z0-9][\w.-]*@[A-Za-z0-9][\w-]*(?:\.\w+)*",
        r"@[A-Za-z_]\w*",
        r"#[A-Za-z]+",
        r"[<>]?[:;=][-o*']?(?:[()\\{@|\[\]]|[DPpO](?!\w))",
        r"[-^x=~<>]_[-^x=~<>]",
        # Words, compounds, two or three of them with slashes
        rf"{_HYPHENED}(?:/{_HYPHENED}){{0,2}}",
        rf"{_FIRST_PART}(?:[-_]{_PART})+",
        rf"\d+(?:[.,]\d+)+(?:-{_PART})+",
        rf"{_LETTER}+(?:\.{_LETTER}+)+",
        r"[A-Za-z]+[!?][A-Za-z]+(?!\w)",
        r"[A-Z]+(?:&[A-Z]+)+",
        r"(?:[Cc]\+\+|[CcF]#)",
        r"(?i:anti|pro)-",
        # An apostrophe that is part of a word
        rf"(?i:[dlno]|[a-z]+[aeiou](?='[aeiou])|c(?='(?:mon|est))|e(?='er)|s(?='mores))'(?!s\b){_LETTER}+",
        r"(?i:[djl]|ol|y)'(?!s\b)",
        rf"(?i:'n'|'(?:em|till?|cause|n){_NO_LETTER})",
        r"'[2-9]0s|'\d\d(?=[\s,.;:!?)-]|$)",
        # Clitics
        r"(?i:([a-z]+)(n't[a-z]*))",
        rf"(?i:('t)(is|was))(?:{_NO_LETTER}|(?=n't))",
        rf"(?i:n't|'(?:s|d|m|ll|re|ve)){_NO_LETTER}",
        # Numbers, initials, abbreviations
        rf"[-+]?{_NUMBER}",
        rf"{_INITIALS}|(?i:ph\.d\.)|[A-Za-z]\.(?!\s+{_one_of(_STARTS)}\s)",
        rf"(?i:{_one_of(_ABBREVIATIONS)})\.",
        rf"{_one_of(_CAPITAL_ABBREVIATIONS)}\.",
        rf"(?i:{_one_of(_BEFORE_NUMBERS)})\.(?=\s?\d)",
        # Runs of marks
        r"(?:[!?]+|_+|#+|@+|\*+|'')",
        r"&(?:lt|gt|quot|apos|nbsp);",
    )
]
_PLAIN = re.compile(r"(?!(?i:cannot|gimme|gonna|gotta|lemme|wanna)\b)[A-Za-z]+(?=[\s,]|$)")
"""Most words of a caption, which need no comparing of patterns."""

_SHORT_FORMS = {"&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'", "&nbsp;": ""}


def caption_words(text: str) -> list[str]:
    """The words of a caption that its metrics are computed on, in lower case."""
    written = _TO_WRITE.sub(lambda sign: _WRITTEN[sign.group()], text)
    return [word for token in _tokens(written) for word in token.lower().split() if word not in _DROPPED]


def _tokens(text: str) -> Iterator[str]:
    """From left to right, the longest token that any pattern finds."""
    at = 0
    while at < len(text):
        if text[at].isspace():
            at += 1
            continue
        if (plain := _PLAIN.match(text, at)) is not None:
            yield plain.group()
            at = plain.end()
            continue
        found = [match for pattern in _PATTERNS if (match := pattern.match(text, at)) is not None]
        if not found:
            yield _mark(text[at])
            at += 1
            continue
        longest = max(found, key=lambda match: match.end())
        parts = [part for part in longest.groups() if part is not None] or [longest.group()]
        yield from (_SHORT_FORMS.get(part) or _without_round_brackets(part) for part in parts)
        at = longest.end()


def _mark(sign: str) -> str:
    """A single mark's token; signs that Stanford's tokenizer does not know are none."""
    known = sign <= "\xff" or "\u2012" < sign < "\u2c00" or "\uff00" < sign < "\uffe7"
    return _BRACKETS.get(sign, sign) if known and sign.isprintable() else ""


def _without_round_brackets(face: str) -> str:
    return face.replace("(", _BRACKETS["("]).replace(")", _BRACKETS[")"])
