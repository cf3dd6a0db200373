"""What image i shows: labels in class order, or prompts from a file."""

import json

import pytest

from util.errors import UserError
from util.evaluation.conditions import ClassLabels, Prompts, class_labels


def write(path, text):
    text = text if isinstance(text, str) else json.dumps(text)
    path.write_text(text, encoding="utf-8", newline="")
    return path


CAPTIONS = {
    "annotations": [
        {"image_id": 7, "id": 3, "caption": " a later caption of 7"},
        {"image_id": 7, "id": 1, "caption": "a dog "},
        {"image_id": 2, "id": 9, "caption": "a cat"},
    ]
}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("lines.txt", "a cat\n\n  a dog  \n"),
        ("lines.jsonl", '{"prompt": "a cat", "id": 1}\n{"text": "a dog"}\n'),
        ("captions.json", CAPTIONS),
        ("windows.txt", "\ufeffa cat\r\n\r\na dog\r\n"),
        ("windows.JSONL", '\ufeff{"prompt": " a cat"}\r\n{"prompt": "a dog"}\r\n'),
    ],
)
def test_prompts_are_read_from_text_json_lines_and_coco_captions(tmp_path, name, content):
    prompts = Prompts.from_file(write(tmp_path / name, content))
    assert prompts.texts == ("a cat", "a dog")
    assert prompts.of([0, 1, 2, 3], 4) == ["a cat", "a dog", "a cat", "a dog"]


@pytest.mark.parametrize("name", ["lines.txt", "lines.jsonl"])
def test_only_the_ends_of_lines_part_prompts(tmp_path, name):
    text = "a cat\u2028and a dog\x85"
    line = text if name == "lines.txt" else json.dumps({"prompt": text}, ensure_ascii=False)
    assert Prompts.from_file(write(tmp_path / name, line)).texts == (text.strip(),)


def test_an_empty_caption_is_not_the_first_of_its_image(tmp_path):
    empty = {"annotations": [{"image_id": 7, "id": 0, "caption": " \n"}, *CAPTIONS["annotations"]]}
    assert Prompts.from_file(write(tmp_path / "c.json", empty)).texts == ("a cat", "a dog")


def one_caption(**kwargs):
    return {"annotations": [{"image_id": 1, "id": 1, "caption": "a", **kwargs}]}


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("mark.txt", "\ufeff", "holds no prompt: write one per line"),
        ("lines.jsonl", '{"prompt": " "}', 'line 1, is not a JSON object with a "prompt" (it'),
        ("half.jsonl", '{"prompt": "\\ud800"}', "surrogates not allowed"),
        ("captions.json", one_caption(caption=None), "captions file (ValueError: no text)"),
        ("captions.json", one_caption(image_id=float("inf")), "captions file (OverflowError"),
        ("empty.txt", "\n \n", "holds no prompt: write one per line"),
        ("lines.jsonl", '{"prompt": "a"}\n{"caption": "b"}', "line 2, is not a JSON object"),
        ("lines.jsonl", "a cat", "line 1, is not a JSON object"),
        ("lines.txt", '{"prompt": "a"}\n', "holds JSON lines: let its name end in .jsonl"),
        ("captions.json", "[1]", "is not a COCO captions file"),
        ("captions.json", "[" * 100000, "is not a COCO captions file"),
        ("lines.jsonl", "[" * 100000, "line 1, is not a JSON object"),
        ("none.txt", None, "cannot be read"),
    ],
)
def test_a_file_without_prompts_is_one_sentence(tmp_path, name, content, sentence):
    path = tmp_path / name
    if content is not None:
        write(path, content)
    with pytest.raises(UserError) as error:
        Prompts.from_file(path)
    assert sentence in str(error.value)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_prompts_that_differ_anywhere_are_described_differently(tmp_path):
    first = Prompts.from_file(write(tmp_path / "a.txt", "a cat\na dog\n"))
    same = Prompts.from_file(write(tmp_path / "a.txt", "a cat\n\na dog"))
    other = Prompts.from_file(write(tmp_path / "a.txt", "a cat\na fox\n"))
    assert first.describe() == same.describe() != other.describe()


def test_labels_and_prompts_are_distinguished():
    assert class_labels(ClassLabels(2).of(range(4), 4)) == [0, 0, 1, 1]
    assert class_labels(["a cat", "a dog"]) is None
