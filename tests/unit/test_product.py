"""Words with several values: what divides, what stays whole, and what is refused."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mapo_lightning.config.product import MAX_POINTS, Product, alternatives
from mapo_lightning.types import ConfigError


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("mapo,apv", ["mapo", "apv"]),
        ("0..4", ["0", "1", "2", "3", "4"]),
        ("-1..1", ["-1", "0", "1"]),
        ("7..7", ["7"]),
        ("0..2,5,8..9", ["0", "1", "2", "5", "8", "9"]),
        ("[1,2],[3]", ["[1,2]", "[3]"]),
        ("{a: 1, b: 2},{a: 3}", ["{a: 1, b: 2}", "{a: 3}"]),
        ("'a,b',c", ["'a,b'", "c"]),
        ("'it''s,b',c", ["'it''s,b'", "c"]),
        (r'"a\",b",c', [r'"a\",b"', "c"]),
        ("it's,b", ["it's", "b"]),
        ("a, b", ["a", "b"]),
        ("null,3", ["null", "3"]),
        ("dmc/walker_run,toy", ["dmc/walker_run", "toy"]),
    ],
)
def test_commas_and_ranges_divide(value: str, found: list[str]) -> None:
    assert alternatives(value) == found


@pytest.mark.parametrize(
    "value",
    [
        "[8,16,32]", "[[1,2],[3,4]]", "{a: 1, b: 2}", "../videos", "../../a..b", "a..b", "1.5..2",
        "0...4", "..", "'a,b'", '"0..4"', "${oc.env:HOME,x}", "f(a,b)", "[a,b", "1e5", "'[',",
        "x[1,2]y", "2001-01-01", "http://HOST:8000/v1", "{scales: {a: 1, b: [2,3]}}",
    ],
)  # fmt: skip
def test_what_means_one_thing_stays_as_it_is(value: str) -> None:
    if value == "'[',":
        with pytest.raises(ConfigError, match="is empty"):
            Product.read([f"key={value}"])
        return
    assert alternatives(value) == [value]
    assert Product.read([f"key={value}"]).axes == {}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["seed=0,"], "a value of 'seed=0,' is empty"),
        (["seed=0,,1"], "is empty"),
        (["seed=0,1,0"], "has the value 0 twice"),
        (["seed=0..3,2"], "has the value 2 twice"),
        (["seed=4..0"], "must count upwards: write 0..4"),
        (["seed=0,1", "seed=3"], "stands on the command line twice"),
        (["seed=0..100000"], "100001 values, and a sweep has at most 1000"),
        (["seed=0..99", "a=0..10"], r"seed \(100\) x a \(11\) are 1100 runs"),
    ],
)
def test_what_cannot_be_meant_is_refused(words: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Product.read(words)


def test_the_advice_for_a_text_with_a_comma_works_in_a_shell() -> None:
    with pytest.raises(ConfigError) as caught:
        Product.read(["data.root=a,"])
    advice = str(caught.value).partition("write ")[2].partition(" for a text")[0]
    (typed,) = shlex.split(advice)
    assert Product.read([typed]).axes == {}


def test_the_last_key_changes_fastest_and_other_words_stay_in_their_places() -> None:
    product = Product.read(["method=a,b", "env=toy", "seed=0..1"])
    assert len(product) == 4
    assert [product.words_of(choice) for choice in product.choices()] == [
        [f"method={method}", "env=toy", f"seed={seed}"] for method in "ab" for seed in "01"
    ]


def test_a_key_with_commas_of_its_own_is_left_alone() -> None:
    assert Product.read(["pool=A,B", "seed=0,1"], ("pool",)).axes == {"seed": ("0", "1")}


plain = st.text(st.sampled_from("ab1.-/:_ "), min_size=1).map(str.strip).filter(bool)
odd = st.text(st.sampled_from("ab1,[](){}'\" ."))
quoted = odd.map(lambda text: "'" + text.replace("'", "''") + "'")
whole = st.recursive(
    plain.filter(lambda text: ".." not in text) | quoted,
    lambda inner: st.lists(inner, max_size=3).map(lambda items: f"[{','.join(items)}]"),
    max_leaves=5,
)


@given(st.lists(whole, min_size=2, max_size=5, unique=True))
def test_joined_values_come_apart_again(values: list[str]) -> None:
    assert alternatives(",".join(values)) == values


@given(st.lists(whole, max_size=4))
def test_whatever_stands_in_brackets_stays_whole(values: list[str]) -> None:
    for left, right in ("[]", "{}", "()"):
        text = f"{left}{','.join(values)}{right}"
        assert alternatives(text) == [text]


@given(st.integers(-(10**6), 10**6), st.integers(0, MAX_POINTS - 1))
def test_a_range_has_both_of_its_ends(first: int, more: int) -> None:
    found = alternatives(f"{first}..{first + more}")
    assert list(map(int, found)) == list(range(first, first + more + 1))


@given(st.text())
def test_any_text_is_divided_or_refused(text: str) -> None:
    try:
        found = alternatives(text)
    except ConfigError:
        return
    assert found
