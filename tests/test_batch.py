"""BatchSchema: where the parts of a batch are found, and what it says when they are not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attn_callbacks import BatchSchema

X, Y = torch.zeros(3, 4), torch.tensor([0, 1, 1])
IDS = torch.ones(3, 5, dtype=torch.long)
IMAGES = torch.rand(3, 3, 8, 8)
HUGGING_FACE = {"input_ids": IDS, "attention_mask": torch.ones(3, 5), "labels": Y}


@pytest.mark.parametrize(
    ("field", "batch", "expected"),
    [
        ("inputs", (X, Y), X),
        ("inputs", [X, Y], X),
        ("inputs", X, X),
        ("inputs", HUGGING_FACE, IDS),
        ("inputs", {"pixel_values": IMAGES}, IMAGES),
        ("target", (X, Y), Y),
        ("target", (X,), None),
        ("target", X, None),
        ("target", HUGGING_FACE, Y),
        ("target", {"label": Y}, Y),
        ("target", {"y": Y}, Y),
        ("valid", HUGGING_FACE, HUGGING_FACE["attention_mask"]),
        ("valid", (HUGGING_FACE, Y), HUGGING_FACE["attention_mask"]),
        ("valid", (X, Y), None),
        ("tokens", HUGGING_FACE, IDS),
        ("tokens", (IDS, Y), IDS),
        ("tokens", IDS, IDS),
        ("tokens", (X, Y), None),
        ("image", (IMAGES, Y), IMAGES),
        ("image", IMAGES, IMAGES),
        ("image", {"image": IMAGES}, IMAGES),
        ("image", (IDS, Y), None),
        ("image", (torch.rand(3, 16, 8, 8), Y), None),
        ("relevance", {"relevance": IDS}, IDS),
        ("relevance", HUGGING_FACE, None),
        ("spurious", {"spurious": IDS}, IDS),
        ("group", {"group": Y}, Y),
        ("group", {"groups": Y}, Y),
        ("group", (X, Y), None),
        ("inputs", (), None),
        ("target", None, None),
    ],
)
def test_defaults(field: str, batch: Any, expected: Any) -> None:
    assert BatchSchema().read(field, batch) is expected


@pytest.mark.parametrize(
    ("reader", "batch"),
    [
        ("y", {"x": X, "y": Y}),
        (2, (X, None, Y)),
        (-1, (X, None, Y)),
        ("2", (X, None, Y)),
        ("-1", [X, Y]),
        (lambda batch: batch["deep"]["y"], {"deep": {"y": Y}}),
        ("y", SimpleNamespace(y=Y)),
    ],
)
def test_readers(reader: Any, batch: Any) -> None:
    assert BatchSchema(target=reader).read("target", batch) is Y


@pytest.mark.parametrize(
    ("reader", "batch", "message"),
    [
        ("z", {"x": X, "y": Y}, "`target` reads 'z' of the batch, which has 'x', 'y'"),
        ("z", {}, "`target` reads 'z' of the batch, which has no keys"),
        ("z", (X, Y), r"`target` reads 'z' of the batch, which has no keys \(a tuple\)"),
        (2, (X, Y), "`target` reads position 2 of a batch that has 2"),
        ("-3", (X, Y), "`target` reads position -3 of a batch that has 2"),
        (0, {"x": X}, "`target` reads 0 of the batch, which has 'x'"),
    ],
)
def test_what_was_named_and_is_missing_is_an_error(reader: Any, batch: Any, message: str) -> None:
    with pytest.raises(KeyError, match=message):
        BatchSchema(target=reader).read("target", batch)


@pytest.mark.parametrize("reader", [1.5, ["labels"], {"a": 1}])
def test_readers_of_another_type_are_refused(reader: Any) -> None:
    with pytest.raises(TypeError, match="`group` must be a key, a position or a function of the batch"):
        BatchSchema(group=reader)


def test_logits_are_not_read_from_a_batch() -> None:
    with pytest.raises(ValueError, match="call `step_logits`"):
        BatchSchema().read("logits", HUGGING_FACE)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ((X, Y), 3),
        (X, 3),
        (HUGGING_FACE, 3),
        ({"tokens": 1}, None),
        ("text", None),
        ({"labels": torch.tensor(1)}, None),
    ],
)
def test_size(batch: Any, expected: int | None) -> None:
    assert BatchSchema().size(batch) == expected


def test_size_of_lists_of_texts() -> None:
    assert BatchSchema(tokens="words").size({"words": [["a"], ["b"]]}) == 2


def test_flags_are_bool_tensors() -> None:
    batch = {"attention_mask": [[1, 0], [1, 1]], "relevance": torch.tensor([[0.0, 1.0]])}
    assert BatchSchema().flags("valid", batch).tolist() == [[True, False], [True, True]]
    assert BatchSchema().flags("relevance", batch).dtype == torch.bool
    assert BatchSchema().flags("spurious", batch) is None


LOGITS, HIDDEN = torch.zeros(3, 2), torch.zeros(3, 5, 4)


@pytest.mark.parametrize(
    ("output", "forwarded", "expected"),
    [
        ({"logits": LOGITS}, [], LOGITS),
        (SimpleNamespace(logits=LOGITS), [], LOGITS),
        (None, [LOGITS], LOGITS),
        (None, [HIDDEN, LOGITS, HIDDEN], LOGITS),
        (None, [{"logits": LOGITS}, HIDDEN], LOGITS),
        ({"logits": LOGITS}, [torch.ones(3, 2)], LOGITS),
        (torch.tensor(0.5), [], None),
        (None, [HIDDEN], None),
        ({"logits": "text"}, [], None),
    ],
)
def test_step_logits(output: Any, forwarded: list[Any], expected: Any) -> None:
    assert BatchSchema().step_logits(output, forwarded) is expected


def test_the_last_logits_win() -> None:
    first, last = torch.zeros(3, 2), torch.ones(3, 2)
    assert BatchSchema().step_logits(None, [first, last]) is last


def test_named_logits_come_from_the_output_only() -> None:
    schema = BatchSchema(logits="scores")
    assert schema.step_logits({"scores": LOGITS}, [HIDDEN]) is LOGITS
    assert schema.step_logits({"logits": LOGITS}, [LOGITS]) is None
    assert BatchSchema(logits=lambda output: output[0]).step_logits([LOGITS]) is LOGITS
    assert BatchSchema(logits=lambda output: "text").step_logits([LOGITS]) is None


def test_repr_shows_what_was_given() -> None:
    assert repr(BatchSchema()) == "BatchSchema()"
    assert repr(BatchSchema(target=1, group="domain")) == "BatchSchema(target=1, group='domain')"


def test_pictures_may_be_bytes_and_token_ids_are_no_pictures() -> None:
    pictures = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    assert BatchSchema().read("image", (pictures, torch.zeros(2))) is pictures
    assert BatchSchema().read("image", (pictures.long(), torch.zeros(2))) is None


def test_named_token_sets_are_read_like_fields() -> None:
    schema = BatchSchema(sets={"names": "name_mask", "loud": lambda batch: batch["input_ids"] > 5})
    batch = {"input_ids": torch.tensor([[5, 6]]), "name_mask": torch.tensor([[1, 0]])}
    assert schema.token_sets == ("relevance", "spurious", "names", "loud")
    assert schema.flags("names", batch).tolist() == [[True, False]]
    assert schema.flags("loud", batch).tolist() == [[False, True]]
    assert "names" in repr(schema)


def test_an_unknown_token_set_is_told() -> None:
    with pytest.raises(KeyError, match="has no token set 'names'"):
        BatchSchema().flags("names", {"names": torch.ones(1, 2)})


def test_sets_must_not_take_the_names_of_fields() -> None:
    with pytest.raises(ValueError, match=r"names of other fields, got \['spurious'\]"):
        BatchSchema(sets={"spurious": "mask"})
    with pytest.raises(TypeError, match="`sets` must map names"):
        BatchSchema(sets=["names"])


def test_a_function_may_be_named_by_its_path() -> None:
    batch = {"y": torch.tensor([1, 2]), "text.ids": torch.tensor([[3, 4], [5, 6]])}
    schema = BatchSchema(group="tests.test_batch.doubled", tokens="text.ids", target="y")
    assert schema.read("group", batch).tolist() == [2, 4]
    assert schema.read("tokens", batch) is batch["text.ids"]  # no such module: a key with a dot in it
    with pytest.raises(KeyError, match=r"`group` reads 'tests\.test_batch\.nothing' of the batch"):
        BatchSchema(group="tests.test_batch.nothing").read("group", batch)


def doubled(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return 2 * batch["y"]
