"""The prompt classifier: yes to the right prompt, no to a wrong colour, shape, ground or relation."""

from pathlib import Path

import numpy as np
import pytest

from util.errors import UserError
from util.shapes import HELD_OUT_START
from util.tiny import prompt_classifier, training
from util.tiny.captions import COLOURS, SHAPES, SINGLE, caption_of, parse, pictures, scene_of
from util.tiny.prompt_classifier import (
    CLASSIFIER,
    STATISTICS,
    PromptClassifier,
    compare,
    prompt_agreement,
)

FOLDER = Path(__file__).parents[3] / "pretrained_models" / "janus_tiny"
UNSEEN = HELD_OUT_START + 500_000  # neither trained on nor in the statistics
COUNT = 200
CAPTIONS = [caption_of(UNSEEN + n) for n in range(COUNT)]


@pytest.fixture(scope="module")
def classifier():
    return PromptClassifier.from_file(FOLDER / CLASSIFIER)


@pytest.fixture(scope="module")
def images():
    return pictures(UNSEEN, COUNT)


def test_unseen_pictures_agree_with_their_captions(classifier, images):
    shares = prompt_agreement(classifier, images, CAPTIONS)
    assert set(shares) == {"all", "shape", "colour", "ground", "relation"}
    assert min(shares.values()) > 0.98


def reworded(caption, attribute):
    """The caption with one attribute wrong: of its first object, of the ground, or the relation."""
    words = caption.split()
    after = lambda word, names: list(names)[(list(names).index(word) + 1) % len(names)]  # noqa: E731
    if attribute == "shape":
        words[2] = after(words[2], SHAPES)
    elif attribute == "colour":
        words[1] = after(words[1], COLOURS)
    elif attribute == "ground":
        words[-2] = {"cream": "pink", "pink": "mint", "mint": "blue", "blue": "cream"}[words[-2]]
    else:
        opposite = {"above": "below", "below": "above", "left": "right", "right": "left"}
        words[3] = opposite[words[3]]
    return " ".join(words)


@pytest.mark.parametrize("attribute", ["shape", "colour", "ground", "relation"])
def test_one_wrong_attribute_is_seen_and_the_others_stay_right(classifier, images, attribute):
    chosen = []
    for n, scene in enumerate(map(parse, CAPTIONS)):
        states = {"ground": scene.ground, "relation": scene.arrangement != SINGLE}
        # two objects of one shape or colour leave open which of them was meant: not asked here
        distinct = len(set(sum(scene.objects, ()))) == 2 * len(scene.objects)
        if states.get(attribute, True) and distinct:
            chosen.append(n)
    wrong = [reworded(CAPTIONS[n], attribute) for n in chosen]
    shares = prompt_agreement(classifier, images[chosen], wrong)
    assert shares["all"] < 0.02 and shares[attribute] < 0.02
    others = [share for name, share in shares.items() if name not in ("all", attribute)]
    assert min(others) > 0.98


def test_another_picture_of_the_same_number_of_objects_does_not_agree(classifier, images):
    assert prompt_agreement(classifier, images.roll(2, dims=0), CAPTIONS)["all"] < 0.03


@pytest.mark.parametrize(
    ("found", "wrong"),
    [
        ("a green star above a purple square on a blue ground", set()),
        ("a green star above a purple square on a pink ground", {"ground"}),
        ("a purple square above a green star on a blue ground", {"relation"}),
        ("a green star left of a purple square on a blue ground", {"relation"}),
        ("a purple star above a green square on a blue ground", {"colour"}),
        ("a green disc above a purple square on a blue ground", {"shape"}),
        ("a green star on a blue ground", {"shape", "colour", "relation"}),
    ],
)
def test_scenes_are_compared_attribute_by_attribute(found, wrong):
    asked = parse("a green star above a purple square on a blue ground")
    result = compare(asked, parse(found))
    assert {name for name, right in result.items() if not right} == wrong


def test_what_a_prompt_leaves_open_is_not_compared():
    found = parse("a red disc on a pink ground")
    assert compare(parse("a red disc"), found) == {"shape": True, "colour": True}


def test_scenes_agree_in_all_attributes_exactly_when_they_are_equal():
    scenes = [scene_of(n) for n in range(0, 120, 3)] + [scene_of(n) for n in range(0, 30, 3)]
    for asked in scenes:
        for found in scenes:
            assert all(compare(asked, found).values()) == (asked == found)


def test_the_bundled_statistics_are_those_of_the_bundled_classifier(classifier, images):
    with np.load(FOLDER / STATISTICS, allow_pickle=False) as stats:
        mu, sigma = stats["mu"], stats["sigma"]
    features = classifier(images)[0].double().numpy()
    assert np.trace(sigma) / 64 == pytest.approx(1, abs=0.1)
    assert np.abs(features.mean(0) - mu).max() < 6 * np.sqrt(sigma.diagonal().max() / COUNT)


def test_training_labels_leave_the_second_object_of_a_single_one_out():
    for index in range(20):
        absent = [label == prompt_classifier.ABSENT for label in prompt_classifier.labels_of(index)]
        single = scene_of(index).arrangement == SINGLE
        assert absent == 4 * [False] + 2 * [single]


def test_a_short_training_learns_the_ground(monkeypatch):
    monkeypatch.setattr(training, "BATCH", 20)
    classifier = prompt_classifier.train(400)
    scenes = classifier.scenes(pictures(UNSEEN, 100))
    right = [scene.ground == scene_of(UNSEEN + n).ground for n, scene in enumerate(scenes)]
    assert sum(right) > 80


def test_wrong_use_is_refused_in_one_sentence(classifier, images, tmp_path):
    with pytest.raises(ValueError, match="a prompt for each image, got 1 for 2"):
        prompt_agreement(classifier, images[:2], CAPTIONS[:1])
    with pytest.raises(ValueError, match="outside the grammar"):
        prompt_agreement(classifier, images[:1], ["a cat"])
    with pytest.raises(UserError, match=r"util\.tiny\.prompt_classifier"):
        PromptClassifier.from_file(tmp_path / CLASSIFIER)
