"""Shows mkdocstrings the comments behind a dataclass's fields, `name: type = default  # what it means`, as a table."""

from __future__ import annotations

from typing import Any

import griffe


class Comments(griffe.Extension):
    """Gives a dataclass the section Attributes, where its docstring has none."""

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        if "dataclass" not in cls.labels and not any("dataclass" in str(deco.value) for deco in cls.decorators):
            return
        text = cls.docstring.value if cls.docstring else ""
        fields = [field for field in cls.attributes.values() if "instance-attribute" in field.labels]
        if fields and "Attributes:" not in text:
            rows = [f"    {field.name}: {comment(field) or field.name.replace('_', ' ')}" for field in fields]
            docstring = "\n".join([text, "", "Attributes:", *rows])
            cls.docstring = griffe.Docstring(docstring, parent=cls, parser="google")  # else it is not parsed


def comment(field: griffe.Attribute) -> str:
    """The comment in the field's line."""
    return field.lines[-1].partition("  # ")[2].strip() if field.lines else ""
