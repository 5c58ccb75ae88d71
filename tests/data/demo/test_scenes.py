"""Demo scenes: the caption follows from the picture, and held-out combinations stay out of training."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from metalm.data.demo.scenes import COLOURS, SHAPES, Scene, draw_scene, held_out_combinations, make_scene
from metalm.data.demo.scoring import attribute_accuracy

SPLITS = ("train", "heldout", "unseen")
SCENES = [make_scene(1, split, index) for split in SPLITS for index in range(300)]


def described(scene: Scene) -> str:
    """The caption of a scene, worked out from where its objects are."""
    ordered = sorted(scene.objects, key=lambda item: item.x)
    horizontal = max(item.y for item in ordered) - min(item.y for item in ordered) < 0.35
    tall = max(item.y for item in ordered) - min(item.y for item in ordered) > 0.2
    names = {item: f"a {item.colour} {item.shape}" for item in ordered}
    if len(ordered) == 1:
        return names[ordered[0]]
    downwards = sorted(scene.objects, key=lambda item: item.y)
    if len(ordered) == 3 and downwards[2].y - downwards[1].y > 0.25 > abs(downwards[1].y - downwards[0].y):
        left, right = sorted(downwards[:2], key=lambda item: item.x)
        return f"{names[left]} left of {names[right]} and {names[downwards[2]]} below"
    if horizontal and ordered[-1].x - ordered[0].x > 0.3:
        return " left of ".join(names[item] for item in ordered)
    assert tall
    return " above ".join(names[item] for item in downwards)


def test_captions_follow_from_the_positions_of_the_objects() -> None:
    assert [described(scene) for scene in SCENES] == [scene.caption for scene in SCENES]


def test_objects_do_not_overlap_and_lie_inside_the_picture() -> None:
    for scene in SCENES:
        for item in scene.objects:
            assert 1.07 * item.radius < min(item.x, item.y, 1 - item.x, 1 - item.y)
        for one, other in itertools.combinations(scene.objects, 2):
            distance = max(abs(one.x - other.x), abs(one.y - other.y))
            assert distance > 1.07 * (one.radius + other.radius)


@pytest.mark.parametrize("image_size", [32, 64, 96])
def test_the_drawn_colour_is_the_named_one(image_size: int) -> None:
    for scene in SCENES[:60]:
        pixels = np.asarray(draw_scene(scene, image_size)).astype(int)
        assert pixels.shape == (image_size, image_size, 3)
        for item in scene.objects:
            middle = pixels[int(item.y * image_size), int(item.x * image_size)]
            distances = {name: np.abs(middle - rgb).sum() for name, rgb in COLOURS.items()}
            assert min(distances, key=lambda name: distances[name]) == item.colour


def test_the_box_of_a_thing_is_what_is_drawn_of_it() -> None:
    size = 256
    for scene in SCENES[:40]:
        for item in scene.objects:
            pixels = np.asarray(draw_scene(replace(scene, objects=(item,)), size)).astype(int)
            rows, columns = np.nonzero(np.abs(pixels - scene.background).sum(axis=-1) > 60)
            found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert np.abs(np.array(found) / size - item.box).max() < 2 / size


def test_held_out_combinations_occur_in_the_unseen_split_alone() -> None:
    held_out = set(held_out_combinations(1))
    assert len(held_out) == len({c for c, _ in held_out}) == len({s for _, s in held_out}) == 4
    for index, scene in enumerate(SCENES):
        combinations = {(item.colour, item.shape) for item in scene.objects}
        assert bool(combinations & held_out) == (SPLITS[index // 300] == "unseen")


def test_training_covers_all_other_combinations() -> None:
    seen = {(item.colour, item.shape) for scene in SCENES[:300] for item in scene.objects}
    assert seen == set(itertools.product(COLOURS, SHAPES)) - set(held_out_combinations(1))


def test_scenes_are_a_function_of_seed_split_and_index() -> None:
    assert make_scene(1, "train", 5) == make_scene(1, "train", 5)
    others = [make_scene(2, "train", 5), make_scene(1, "heldout", 5), make_scene(1, "train", 6)]
    assert all(make_scene(1, "train", 5) != other for other in others)


def test_captions_use_few_words() -> None:
    words = {word for scene in SCENES for word in scene.caption.split()}
    assert words == {"a", "left", "of", "above", "and", "below", *COLOURS, *SHAPES}


@pytest.mark.parametrize(
    ("predicted", "reference", "accuracy"),
    [
        ("a red circle", "a red circle", 1.0),
        ("A red circle.", "a red circle", 1.0),
        ("a red square", "a red circle", 0.5),
        ("", "a red circle", 0.0),
        ("a red", "a red circle", 0.5),
        ("a circle", "a red circle", 0.5),
        ("a red circle left of a blue star", "a red circle", 0.5),
        ("a red circle", "a red circle left of a blue star", 0.5),
        ("a blue star left of a red circle", "a red circle left of a blue star", 0.0),
        ("a red red circle", "a red circle", 0.25),
        ("a red star above a blue star", "a red circle above a blue star", 0.75),
    ],
)
def test_attribute_accuracy_compares_object_by_object(
    predicted: str, reference: str, accuracy: float
) -> None:
    assert attribute_accuracy([predicted], [reference]) == accuracy


def test_attribute_accuracy_weighs_attributes_not_captions() -> None:
    reference = "a red circle left of a blue star and a green cross below"
    assert attribute_accuracy(["a red circle", reference], ["a blue star", reference]) == 6 / 8
    with pytest.raises(ValueError, match="at least one caption"):
        attribute_accuracy([], [])
    with pytest.raises(ValueError, match="longer"):
        attribute_accuracy([], ["a red circle"])
