import pytest

from guardspace_kernels.guard import forms

RIGHT = [
    (forms.text, ["", "x"]),
    (forms.flag, [True, False]),
    (forms.count, [0, 2**53]),
    (forms.whole, [-(2**53), 0, 7]),
    (forms.number, [0, -1.5, 1e300]),
    (forms.one_of(["a", "b"]), ["a"]),
    (forms.maybe(forms.count), [None, 1]),
    (forms.several(forms.count), [[], [1, 2]]),
    (forms.exactly(forms.count, forms.text), [[1, "x"]]),
    (forms.named(forms.count), [{}, {"a": 1}]),
    (forms.fields({"a": forms.count}, {"b": forms.text}), [{"a": 1}, {"a": 1, "b": "x"}]),
]

WRONG = [
    (forms.text, [None, 1, [], {}], "a text"),
    (forms.flag, [0, 1, None, "true"], "true or false"),
    (forms.count, [-1, 1.0, True, "1", None, 2**53 + 1, 10**400], "a whole number of 0 or more"),
    (forms.whole, [1.5, False, None, -(10**400)], "a whole number"),
    (forms.number, [float("nan"), float("inf"), -float("inf"), 10**400, True, "1", None], "a finite number"),
    (forms.one_of(["a", "b"]), ["c", None, ["a"], {}], "one of a, b"),
    (forms.several(forms.count), [None, {}, "12"], "a list"),
    (forms.several(forms.count, 1), [[], None], "a list of 1 or more entries"),
    (forms.several(forms.count, at_most=1), [[1, 2]], "a list"),
    (forms.exactly(forms.count, forms.text), [[], [1], [1, "x", 2], "ab", None], "a list of 2 entries"),
    (forms.named(forms.count), [None, [], "a"], "an object"),
    (forms.fields({}), [None, [], "a"], "an object"),
]


def test_what_is_right_is_returned():
    for form, values in RIGHT:
        for value in values:
            assert form(value, "here") == value


@pytest.mark.parametrize("form, values, wanted", WRONG, ids=[wanted for *_, wanted in WRONG])
def test_what_is_wrong_is_named(form, values, wanted):
    for value in values:
        with pytest.raises(ValueError, match=rf"^here must be {wanted}, got ") as raised:
            form(value, "here")
        assert len(str(raised.value)) < 200  # of a number with 400 digits too


def test_the_place_is_named():
    form = forms.fields({"a": forms.several(forms.exactly(forms.count, forms.named(forms.flag)))}, {"b": forms.text})
    for value, match in (
        ({"a": [[1, {}], [1, {"x": 2}]]}, r"^file: header\.a\[1\]\[1\]\.x must be true or false, got 2$"),
        ({"b": "x"}, r"^file: header lacks a$"),
        ({"a": [], "c": 1}, r"^file: header has an unknown entry 'c'$"),
        ({"a": [], "b": 1}, r"^file: header\.b must be a text, got 1$"),
    ):
        with pytest.raises(ValueError, match=match):
            form(value, "file: header")


def test_a_value_that_is_nested_deeply_is_shown_in_short():
    value = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(ValueError, match=r"^here must be a text, got \[+\.\.\.\]+$"):
        forms.text(value, "here")
    while value:  # piece by piece: freeing it at once takes as many nested calls
        value = value[0]
