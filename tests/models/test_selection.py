import pytest

from klfast.core.errors import InvalidInputError, UnknownLayerError
from klfast.models.selection import matching, select

NAMES = [f"backbone.layers.{i}.mixer.{part}" for i in (0, 1, 10) for part in ("in_proj", "x_proj", "out_proj")] + [
    "lm_head"
]


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("lm_head", 1),
        ("backbone.layers.1.mixer.in_proj", 1),  # not layers.10 or layers.11
        ("in_proj", 3),
        ("mixer.in_proj", 3),
        ("0.mixer.in_proj", 1),  # parts are matched whole: layers.10 does not end with ".0.mixer.in_proj"
        ("layers.0.*", 3),
        ("layers.1*", 6),
        ("*_proj", 9),
        ("[ix]*_proj", 6),
        (r"re:.*layers\.[01]\.", 6),
        ("re:lm", 1),
        ("*", 10),
    ],
)
def test_pattern_selects_names_tails_globs_and_expressions(pattern, count):
    found = matching(pattern, NAMES)
    assert len(found) == count
    assert found == [name for name in NAMES if name in found]


def test_select_keeps_model_order_and_applies_exclude_last():
    assert select(NAMES, ["lm_head", "layers.0.*"], "x_proj") == [NAMES[0], NAMES[2], "lm_head"]
    assert select(NAMES, exclude="*_proj") == ["lm_head"]
    assert select(NAMES) == NAMES
    assert select(NAMES, iter(["lm_head"])) == ["lm_head"]


def test_bad_patterns_are_refused_in_one_line():
    with pytest.raises(UnknownLayerError, match="no linear layer matches 'in_porj'; did you mean 'in_proj'"):
        select(NAMES, "in_porj")
    with pytest.raises(UnknownLayerError, match="matches 'lm_head2'"):
        select(NAMES, exclude=["lm_head2"])
    with pytest.raises(InvalidInputError, match="leave no linear layer"):
        select(NAMES, "lm_head", "lm_*")
    with pytest.raises(InvalidInputError, match="leave no linear layer"):
        select(NAMES, [])
    with pytest.raises(InvalidInputError, match=r"'re:\(' is not a regular expression"):
        matching("re:(", NAMES)
    with pytest.raises(InvalidInputError, match="must be a string, got int"):
        select(NAMES, [3])
