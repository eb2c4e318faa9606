"""The public face is annotated, so that `mypy --strict` finds no untyped call in a user's script."""

import inspect

import pytest

import sapo_trl


CLASSES = [name for name in sapo_trl.__all__ if inspect.isclass(getattr(sapo_trl, name))]
# Signatures of TRL's and transformers' own, which are not annotated there either.
INHERITED = ("on_", "create_scheduler", "training_step")


def own_functions(cls: type) -> dict[str, object]:
    found = {}
    for name, member in vars(cls).items():
        function = inspect.unwrap(getattr(member, "__func__", member))
        if (
            (name.startswith("_") and name != "__init__")
            or name.startswith(INHERITED)
            or not inspect.isfunction(function)
        ):
            continue
        found[name] = function
    return found


@pytest.mark.parametrize("name", CLASSES)
def test_methods_of_public_classes(name):
    untyped = []
    for method, function in own_functions(getattr(sapo_trl, name)).items():
        signature = inspect.signature(function)
        parameters = list(signature.parameters.values())
        bare = [p.name for p in parameters if p.annotation is p.empty and p.name not in ("self", "cls")]
        untyped += [f"{method}({parameter})" for parameter in bare]
        implied = method == "__init__" and len(parameters) > 1  # an annotated parameter is enough for mypy
        untyped += [f"{method} ->"] if signature.return_annotation is signature.empty and not implied else []
    assert untyped == []


def test_train_is_covered():
    assert "train" in own_functions(sapo_trl.SAPOTrainer)
    assert inspect.signature(sapo_trl.SAPOTrainer.train).return_annotation == "TrainOutput"


def test_segments_are_short_in_print():
    import torch

    segments = sapo_trl.Segments(torch.tensor([[0, 0, 1, 2, -1] * 400, [0] * 2000]).cummax(1).values)
    assert repr(segments) == "Segments(2 rows of 2000 positions, 1 to 3 segments in a row, cpu)"
