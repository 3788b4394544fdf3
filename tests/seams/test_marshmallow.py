"""Schemas as steps, and strings that every store can hold."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, strategies as st
from marshmallow import Schema, ValidationError, fields, validate

from tta_sync.exceptions import ConfigurationError
from tta_sync.facade import run_sync
from tta_sync.marshmallow import SafeString, dump_step, load_step
from tta_sync.primitives.core.base import step


class Point(Schema):
    x = fields.Integer(required=True)
    at = fields.DateTime()


@step
async def add_secret(data: dict[str, Any]) -> dict[str, Any]:
    return {**data, "secret": 1}


def test_schemas_stand_in_a_workflow() -> None:
    """load_step >> ... >> dump_step: validated at the head, cut to the schema's fields at the tail."""
    flow = load_step(Point) >> add_secret >> dump_step(Point)
    assert run_sync(flow, {"x": "3", "at": "2026-01-02T03:04:05"}) == {"x": 3, "at": "2026-01-02T03:04:05"}


def test_error_passes_through_as_itself_when_data_does_not_fit() -> None:
    """marshmallow's own ValidationError, with its messages and a note that names the step."""
    with pytest.raises(ValidationError) as caught:
        run_sync(add_secret >> load_step(Point), {"x": 1})
    assert caught.value.messages == {"secret": ["Unknown field."]}
    assert "load_step(Point)" in caught.value.__notes__[0]


def test_instances_and_many_are_taken_as_they_are() -> None:
    """A schema's own options hold; many= works for classes and overrides instances."""
    assert run_sync(load_step(Point(partial=True)), {}) == {}
    assert run_sync(load_step(Point, many=True), [{"x": 1}, {"x": 2}]) == [{"x": 1}, {"x": 2}]
    assert run_sync(dump_step(Point(many=True)), [{"x": 1}]) == [{"x": 1}]
    assert run_sync(load_step(Point(many=True), many=False), {"x": 1}) == {"x": 1}


def test_steps_are_named_after_their_schema() -> None:
    """For messages and diagrams; name= overrides."""
    assert repr(load_step(Point)) == "load_step(Point)"
    assert repr(dump_step(Point)) == "dump_step(Point)"
    assert repr(load_step(Point, name="answer")) == "answer"


@pytest.mark.parametrize("wrong", [None, dict, {"x": 1}, fields.Integer()])
def test_what_is_no_schema_is_refused(wrong: Any) -> None:
    """At construction, with the remedy."""
    with pytest.raises(ConfigurationError, match="Schema"):
        load_step(wrong)


class Text(Schema):
    text = SafeString(required=True, validate=validate.Length(max=5))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\x00", "Contains a NUL character."),
        ("\ud800", "Contains a lone surrogate, which is not a character."),
        ("\udfff\ud800", "Contains a lone surrogate, which is not a character."),
        (1, "Not a valid string."),
        ("123456", "Longer than maximum length 5."),
    ],
)
def test_safe_string_refuses_what_cannot_be_stored(text: Any, message: str) -> None:
    """NUL and lone surrogates are field errors, beside what a String refuses."""
    with pytest.raises(ValidationError) as caught:
        Text().load({"text": text})
    assert caught.value.messages == {"text": [message]}


def test_safe_string_takes_its_messages_from_the_application() -> None:
    """Messages can be replaced, in the application's language say."""
    field = SafeString(error_messages={"nul": "Nullzeichen."})
    with pytest.raises(ValidationError, match="Nullzeichen"):
        field.deserialize("\x00")


@given(st.text())
def test_safe_string_takes_exactly_what_utf8_and_postgresql_take(text: str) -> None:
    """Whatever passes has a UTF-8 form without NUL, and comes out unchanged."""
    storable = "\x00" not in text and text.encode("utf-8", "replace").decode() == text
    field = SafeString()
    if storable:
        assert field.deserialize(text) == text
    else:
        with pytest.raises(ValidationError):
            field.deserialize(text)


@given(st.lists(st.sampled_from(["a", "\x00", "\ud800", "\udc00", "\U0001f600"]), max_size=4).map("".join))
def test_safe_string_never_lets_a_bad_character_through(text: str) -> None:
    """The same, with the dangerous characters likely."""
    test_safe_string_takes_exactly_what_utf8_and_postgresql_take.hypothesis.inner_test(text)
