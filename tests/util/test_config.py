"""Frozen dataclasses as flags: names, values, ranges, groups that are switched on, and families."""

from dataclasses import dataclass

import pytest

from util.config import FlagParser, setting
from util.errors import UserError


def parse_pair(text: str) -> tuple[int, ...]:
    parts = tuple(int(part) for part in text.split(","))
    if len(parts) != 2:
        raise ValueError(f"{text!r} is not a pair")
    return parts


@dataclass(frozen=True)
class Kitchen:
    """One field of each type, and one without a flag."""

    cups: int = setting(4, "cups on the table", least=1)
    salt: float = setting(0.5, "salt per cup, 100% at most", least=0, most=1)
    salt_2: float | None = setting(None, "of the second cup")
    dish: str = setting("soup", "what is cooked", choices=("soup", "stew"))
    hot: bool = setting(True, "served hot")
    spicy: bool = setting(False, "with pepper")
    size: tuple[int, ...] = setting((2, 3), "width, height", parse=parse_pair, flag="table")
    hidden: int = 7

    def __post_init__(self) -> None:
        if self.dish == "stew" and not self.hot:
            raise ValueError("a stew is served hot: remove --no_hot")
        if self.size[0] > self.size[1]:
            raise ValueError(f"size is {self.size}; it must ascend")


@dataclass(frozen=True)
class Oven:
    """An optional group."""

    degrees: int = setting(180, "of the oven", least=50)

    def __post_init__(self) -> None:
        if self.degrees % 10:
            raise ValueError(f"degrees is {self.degrees}; it must be a multiple of 10")


def parser_of(**defaults) -> FlagParser:
    parser = FlagParser("cook.py", "Cook.", defaults)
    parser.add(Kitchen, "kitchen")
    parser.add(Oven, "oven", prefix="oven_", switch=("bake", "use the oven"), owner="Bakers")
    return parser


def build(*words: str, **defaults) -> Kitchen:
    return parser_of(**defaults).parse(words).build(Kitchen)


def test_without_flags_a_config_is_the_class_itself():
    assert build() == Kitchen()


def test_values_are_parsed_by_the_type_of_the_field():
    words = "--cups 2 --salt 1 --salt_2 0.25 --dish stew --hot --spicy --table 5,6"
    config = build(*words.split())
    assert config == Kitchen(2, 1.0, 0.25, "stew", True, True, (5, 6))
    assert isinstance(config.salt, float)


def test_given_flags_win_over_defaults_of_the_call_then_of_the_command_then_of_the_class():
    flags = parser_of(cups=5, salt=0.1, dish="stew").parse(["--cups", "9"])
    config = flags.build(Kitchen, {"cups": 6, "salt": 0.2})
    assert (config.cups, config.salt, config.dish, config.spicy) == (9, 0.2, "stew", False)
    assert flags.given == {"cups": 9}
    assert flags.resolved["salt"] == 0.2
    assert flags.resolved["table"] == (2, 3)


@pytest.mark.parametrize(
    ("words", "hot", "spicy"),
    [
        ((), True, False),
        (("--no_hot",), False, False),
        (("--no-hot",), False, False),
        (("--hot", "false"), False, False),
        (("--hot=no",), False, False),
        (("--spicy",), True, True),
        (("--spicy", "1"), True, True),
        (("--spicy", "True", "--hot", "0"), False, True),
        (("--no_hot", "--hot"), True, False),
    ],
)
def test_booleans_are_switches_or_take_a_word(words, hot, spicy):
    config = build(*words)
    assert (config.hot, config.spicy) == (hot, spicy)


def test_dashes_and_underscores_are_the_same_in_names_and_stay_in_values():
    flags = parser_of().parse(["--salt-2=-1.5", "--bake", "--oven-degrees", "200"])
    assert flags.given == {"salt_2": -1.5, "bake": True, "oven_degrees": 200}
    assert build("--salt_2", "-0.5").salt_2 == -0.5


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--cups 0", "--cups is 0; it must be a number of at least 1"),
        ("--salt 1.5", "--salt is 1.5; it must be at most 1"),
        ("--salt nan", "--salt is nan; it must be a number of at least 0"),
        ("--salt_2 inf", "--salt_2 is inf; it must be a number"),
        ("--cups many", "argument --cups: invalid int value: 'many'"),
        ("--hot maybe", "'maybe' is neither true nor false"),
        ("--dish cake", "'cake' (choose from"),
        ("--table 1", "'1' is not a pair"),
        ("--table 3,2", "--table is (3, 2); it must ascend"),
        ("--fork 1", "unrecognized arguments: --fork 1"),
        ("--dish stew --no_hot", "a stew is served hot: remove --no_hot"),
    ],
)
def test_a_mistake_is_one_sentence_with_the_flag_and_its_value(words, sentence):
    with pytest.raises(UserError) as error:
        build(*words.split())
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_default_of_the_command_is_checked_too():
    with pytest.raises(UserError, match="--cups is -1"):
        build(cups=-1)


def test_an_optional_group_is_none_until_its_switch_and_its_flags_ask_for_the_switch():
    def optional(*words):
        flags = parser_of().parse(words)
        return flags.build_optional(Oven, "bake", "baking", prefix="oven_")

    assert optional() is None
    assert optional("--bake", "false") is None
    assert optional("--bake") == Oven()
    assert optional("--bake", "--oven_degrees", "220") == Oven(220)
    with pytest.raises(UserError, match="--oven_degrees belongs to baking: add --bake"):
        optional("--oven_degrees", "220")
    with pytest.raises(UserError, match="--oven_degrees is 20"):
        optional("--bake", "--oven_degrees", "20")
    with pytest.raises(UserError, match="--oven_degrees is 205; it must be a multiple of 10"):
        optional("--bake", "--oven_degrees", "205")


def test_flags_of_another_family_are_refused_and_shared_ones_are_not():
    parser = parser_of()
    parser.add(Oven, "grill", prefix="oven_", owner="Grillers")
    flags = parser.parse(["--oven_degrees", "200", "--cups", "2"])
    flags.refuse_foreign("Bakers", "bread")
    flags.refuse_foreign("Grillers", "steak")
    with pytest.raises(UserError) as error:
        flags.refuse_foreign("Cooks", "rice")
    sentence = "--oven_degrees is for Bakers and Grillers models; --model rice is a Cooks model"
    assert str(error.value) == sentence
    with pytest.raises(UserError, match="--bake is for Bakers models"):
        parser.parse(["--bake"]).refuse_foreign("Grillers", "steak")


def test_a_flag_that_two_classes_name_is_one_flag():
    @dataclass(frozen=True)
    class Party:
        cups: int = setting(40, "cups", least=1)

    parser = parser_of()
    parser.add(Party, "party")
    flags = parser.parse(["--cups", "3"])
    assert (flags.build(Party).cups, flags.build(Kitchen).cups) == (3, 3)
    assert parser.parse([]).build(Party).cups == 40


def test_help_shows_groups_and_the_defaults_that_hold(capsys):
    parser = FlagParser("cook.py", "Cook.", {"cups": 5})
    parser.add(Kitchen, "kitchen", defaults={"salt": 0.75}, from_model=("dish",))
    with pytest.raises(SystemExit) as exit_info:
        parser.parse(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert "kitchen:" in text
    lines = "cups on the table [5]", "100% at most [0.75]", "what is cooked [model]"
    for line in (*lines, "width, height [2,3]"):
        assert line in text
    assert "hidden" not in text
