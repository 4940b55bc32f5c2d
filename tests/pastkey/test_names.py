from __future__ import annotations

from pastkey import names


def test_the_tensors_of_a_layer_differ_by_what_they_hold() -> None:
    made = {name(layer) for name in (names.past_key, names.past_value, names.present_key, names.present_value)
            for layer in (0, 1, 11)}  # fmt: skip
    assert len(made) == 12
    assert names.past_key(11) == "past_key_values.11.key"
    assert names.present_value(0) == "present.0.value"
