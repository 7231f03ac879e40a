"""Which fields of a model task may be submitted, how they are described."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest


@pytest.fixture
def make(django_project: object) -> Iterator[Any]:
    """Give `make(field=…, submit_fields=…)`: a throwaway StreamTask with these attributes."""
    from django.apps import apps

    from taskkit.stream_task import StreamTask

    before = dict(apps.all_models["proj"])

    def build(**attributes: Any) -> Any:
        return type("Throwaway", (StreamTask,), {"__module__": "tests.project.models", **attributes})

    yield build
    models = apps.all_models["proj"]
    for name in models.keys() - before.keys():
        del models[name]
    apps.clear_cache()


def test_own_editable_plain_fields_are_offered(make: Any) -> None:
    from django.db import models

    from taskkit.model_schema import model_parameters

    schema = model_parameters(
        make(
            name=models.CharField(max_length=5),
            count=models.PositiveIntegerField(default=3, help_text="how many"),
            hidden=models.CharField(max_length=5, editable=False),
            user=models.ForeignKey("auth.User", models.CASCADE),
            document=models.FileField(),
        )
    )
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["properties"] == {
        "name": {"type": "string", "maxLength": 5},
        "count": {"type": "integer", "default": 3, "description": "how many"},
    }
    assert schema["required"] == ["name"]
    assert schema["additionalProperties"] is False


def test_kinds_of_fields(make: Any) -> None:
    from django.db import models

    from taskkit.model_schema import model_parameters

    schema = model_parameters(
        make(
            on=models.BooleanField(),
            ratio=models.FloatField(null=True, blank=True),
            price=models.DecimalField(max_digits=5, decimal_places=2),
            when=models.DateTimeField(),
            day=models.DateField(),
            email=models.EmailField(),
            id_of=models.UUIDField(),
            data=models.JSONField(default=dict),
            mode=models.CharField(max_length=9, choices={"a": "A", "b": "B"}, blank=True),
            size=models.IntegerField(choices=[(1, "one"), (2, "two")], null=True, blank=True),
            late=models.CharField(max_length=9, choices=lambda: [("x", "X")]),
        )
    )
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["properties"] == {
        "on": {"type": "boolean"},
        "ratio": {"type": ["number", "null"]},
        "price": {"type": ["string", "number"]},
        "when": {"type": "string", "format": "date-time"},
        "day": {"type": "string", "format": "date"},
        "email": {"type": "string", "format": "email", "maxLength": 254},
        "id_of": {"type": "string", "format": "uuid"},
        "data": {},
        "mode": {"type": "string", "maxLength": 9, "enum": ["a", "b", ""]},
        "size": {"type": ["integer", "null"], "enum": [1, 2, None]},
        "late": {"type": "string", "maxLength": 9},
    }
    assert schema["required"] == ["on", "price", "when", "day", "email", "id_of", "late"]


def test_submit_fields_decides_when_it_is_there(make: Any) -> None:
    from django.db import models

    from taskkit.model_schema import model_parameters, submit_fields

    model = make(
        name=models.CharField(max_length=5),
        user=models.ForeignKey("auth.User", models.CASCADE),
        submit_fields=("user",),
    )
    assert [field.name for field in submit_fields(model)] == ["user"]
    assert list(model_parameters(model)["properties"]) == ["user"]


@pytest.mark.parametrize("name", ["nothing", "groups", "process"])
def test_submit_fields_names_columns_only(make: Any, name: str) -> None:
    from django.db import models

    from taskkit.model_schema import submit_fields

    model = make(groups=models.ManyToManyField("auth.Group"), submit_fields=(name,))
    with pytest.raises(ValueError, match=rf"Throwaway: submit_fields has '{name}'"):
        submit_fields(model)
