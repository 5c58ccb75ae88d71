"""What BIG-bench's examples hold, task by task: the owner's one text taken apart again.

Every parser yields records with the values by which records belong together: a claim, a passage, a dialogue.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from metalm.errors import DataError
from metalm.reproduction.data.splitting import normalised, place_of

Example = dict[str, Any]
Keys = list[tuple[str, str]]
"""Kind and value."""
Parsed = Iterator[tuple[dict[str, Any], Keys]]
Parser = Callable[[list[Example]], Parsed]

_CHARACTERS = {
    "-LRB-": "(",
    "-RRB-": ")",
    "-LSB-": "[",
    "-RSB-": "]",
    "-COLON-": ":",
    "``": '"',
    "''": '"',
    "\N{REPLACEMENT CHARACTER}": " ",
}
"""How treebanks write some, and the one for those that were lost."""
_START_WORDS = 6
"""By which sentences are recognised that differ in their ends: the twins of Winograd's schemas."""
_ENDS = 60
"""Characters at both ends by which a dialogue is recognised, whatever is asked about it."""
_SHOWN_TURNS = 4


def _parts(example: Example, pattern: str) -> tuple[str, ...]:
    """The groups of a pattern that all of an example's input matches."""
    match = re.fullmatch(pattern, example["input"], re.DOTALL)
    if match is None:
        raise DataError(f"an example of BIG-bench is not as expected: {example['input'][:120]!r}")
    return tuple(part.strip() for part in match.groups())


def _right(example: Example) -> str:
    """The option that has the score."""
    return max(example["target_scores"], key=lambda option: example["target_scores"][option])


def _chosen(options: Iterable[str], right: str) -> dict[str, Any]:
    """Options in an order as if at random (in some tasks the last is always right), and which is right."""
    texts = sorted({option.strip() for option in options}, key=lambda text: place_of(f"{right} {text}"))
    return {"options": texts, "answer": texts.index(right.strip())}


def _targets(example: Example) -> list[str]:
    """Free answers, without the stop that some owners put behind them."""
    target = example["target"]
    texts = [target] if isinstance(target, str) else target
    return [text.strip().removesuffix(".").rstrip() for text in texts]


def _plain(text: str) -> str:
    for written, character in _CHARACTERS.items():
        text = text.replace(written, character)
    return text


def _start(text: str) -> str:
    return " ".join(normalised(text).split()[:_START_WORDS])


def vitaminc(examples: list[Example]) -> Parsed:
    """A claim, and a passage of an article in one of its revisions."""
    for example in examples:
        parts = _parts(example, r"(.*?): (.*)\nClaim: (.*)")
        title, passage, claim = (_plain(part) for part in parts)
        record = {"article": title, "passage": passage, "claim": claim, "label": _right(example).lower()}
        yield record, [("article", title), ("passage", normalised(passage)), ("claim", normalised(claim))]


def fever(examples: list[Example]) -> Parsed:
    """A claim alone; many are VitaminC's, too."""
    for example in examples:
        (claim,) = _parts(example, r"On June 2017, the following claim was made: (.*)\nQ: .*")
        yield {"claim": claim, "label": _right(example)}, [("claim", normalised(claim))]


def multiemo(examples: list[Example]) -> Parsed:
    """A sentence of a review; the review is not given."""
    for example in examples:
        text = example["input"].strip()
        yield {"text": text, "label": _right(example)}, [("text", normalised(text))]


def winowhy(examples: list[Example]) -> Parsed:
    """A Winograd sentence, and a reason for what its pronoun refers to."""
    for example in examples:
        sentence, reason = _parts(example, r"(.*?) (The '[^']*' refers? to .*)")
        yield (
            {"sentence": sentence, "reason": reason, "label": _right(example)},
            [("start", _start(sentence))],
        )


def winogrande(examples: list[Example]) -> Parsed:
    """A sentence with a blank, and the word of it that belongs there."""
    for example in examples:
        word, sentence = _parts(example, r"Context Word: (.*?)\. \nQuestion: (.*)")
        record = {"sentence": sentence, "answers": _targets(example)}
        yield record, [("word", normalised(word)), ("start", _start(sentence))]


def social_iqa(examples: list[Example]) -> Parsed:
    """What happened, a question about it, and three answers."""
    for example in examples:
        happened, question = _parts(example, r"(.*[.!?\"']) *([^.!?]*\?) *")
        record = {"text": happened, "question": question} | _chosen(example["target_scores"], _right(example))
        yield record, [("text", _start(happened))]


def wikihow_goals(examples: list[Example]) -> Parsed:
    """A step, and four goals."""
    for example in examples:
        (step,) = _parts(example, r"The most reasonable goal of '(.*)' is ")
        right = _right(example)
        record = {"step": step} | _chosen(example["target_scores"], right)
        yield record, [("goal", normalised(right)), ("step", normalised(step))]


def wikihow_steps(examples: list[Example]) -> Parsed:
    """A goal, and four steps."""
    for example in examples:
        (goal,) = _parts(example, r"The most reasonable step of '(.*)' is ")
        right = _right(example)
        record = {"goal": goal} | _chosen(example["target_scores"], right)
        yield record, [("goal", normalised(goal)), ("step", normalised(right))]


def wikihow_order(examples: list[Example]) -> Parsed:
    """A goal, and two steps, of which one comes first."""
    for example in examples:
        goal, one, other = _parts(
            example, r"In order to '(.*)', one can '(.*)' and '(.*)'\. Which should happen first\? "
        )
        record = {"goal": goal} | _chosen(example["target_scores"], _right(example))
        steps = [("step", normalised(step)) for step in (one, other)]
        yield record, [("goal", normalised(goal)), *steps]


def cosmos_qa(examples: list[Example]) -> Parsed:
    """A passage of a blog, a question, and answers: the right one stands in the input for wrong ones."""
    pattern = r"Context: (.*) \nQuestion: (.*) \nCorrect Answer: (.*)"
    for example in examples:
        passage, question, right = _parts(example, pattern)
        record = {"passage": passage, "question": question} | _chosen([right, *example["target"]], right)
        if len(record["options"]) > 1:
            yield record, [("passage", normalised(passage))]


def disfl_qa(examples: list[Example]) -> Parsed:
    """A question that its speaker corrects, and a passage; `unknown` where this has no answer."""
    for example in examples:
        question, passage = _parts(example, r"(.*?) *\ncontext: (.*)")
        record = {"passage": passage, "question": question, "answers": _targets(example)}
        yield record, [("passage", normalised(passage))]


def passages(examples: list[Example]) -> Parsed:
    """A passage, a question and its answers: Quoref, and DROP with the type of the answer."""
    for example in examples:
        passage, rest = _parts(example, r"Passage: (.*?) ?\nQuestion: (.*)")
        question = rest.partition("\nAnswer type:")[0].strip()
        record = {"passage": passage, "question": question, "answers": _targets(example)}
        yield record, [("passage", normalised(passage))]


def ropes(examples: list[Example]) -> Parsed:
    """What causes what, a story, and a question."""
    for example in examples:
        background, story, question = _parts(
            example, r"Background Paragraph: (.*?) ?\nStory: (.*?) ?\nQuestion: (.*)"
        )
        record = {"background": background, "story": story, "question": question}
        keys = [("background", normalised(background)), ("story", normalised(story))]
        yield record | {"answers": _targets(example)}, keys


def wikidata(examples: list[Example]) -> Parsed:
    """The beginning of a sentence about something or someone."""
    for example in examples:
        text = example["input"].strip()
        subject = text.rpartition(" of ")[2].removesuffix(" is")
        yield {"text": text, "answers": _targets(example)}, [("subject", normalised(subject))]


def structures(examples: list[Example]) -> Parsed:
    """Attributes, triples or concepts, and all texts that say them."""
    texts: dict[str, list[str]] = defaultdict(list)
    for example in examples:
        target = example["target"]
        texts[example["input"].strip()] += [target] if isinstance(target, str) else target
    for content, said in texts.items():
        yield {"content": content, "texts": said}, [("content", normalised(content))]


def triples(examples: list[Example]) -> Parsed:
    """As `structures`, of triples; those with a subject in common belong together."""
    for record, keys in structures(examples):
        subjects = [part.partition(" | ")[0].strip("( ") for part in record["content"].split("), (")]
        record["content"] = record["content"].replace("_", " ")
        yield record, [*keys, *(("subject", subject) for subject in subjects)]


def xsum(examples: list[Example]) -> Parsed:
    """An article, and a sentence about it."""
    for example in examples:
        article = example["input"].strip()
        yield {"article": article, "summary": example["target"].strip()}, [("article", normalised(article))]


def timedial(examples: list[Example]) -> Parsed:
    """A dialogue with a blank for a time or a number, and three phrases."""
    for example in examples:
        (dialogue,) = _parts(example, r"Which phrase best fits the <MASK> span\? Context: ?\n(.*)")
        record = {"dialogue": dialogue.replace("<MASK>", "____").replace(" \n", "\n")}
        ends = normalised(dialogue)
        keys = [("start", ends[:_ENDS]), ("end", ends[-_ENDS:])]
        yield record | _chosen(example["target_scores"], _right(example)), keys


def topical_chat(examples: list[Example]) -> Parsed:
    """The last turns of a conversation, and the next one."""
    for example in examples:
        turns = re.split(r" (?=agent_[AB]: )", example["input"].strip())
        shown = [turn.replace("agent_", "").replace(': "', ": ").removesuffix('"') for turn in turns]
        record = {"dialogue": "\n".join(shown[-_SHOWN_TURNS:]), "reply": example["target"].strip('" ')}
        if record["reply"]:
            yield record, [("conversation", example["comment"])]
