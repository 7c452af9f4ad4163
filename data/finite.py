"""Numbers that are NaN or infinite: found where they first come up, before they spoil more."""

import math
from collections.abc import Callable, Iterable

import torch


def check(
    what: str,
    numbers: dict[str, torch.Tensor],
    rows: Iterable[torch.Tensor] = (),
    axes: tuple[str, ...] = ("batch row",),
    about: Callable[..., str] | None = None,
) -> None:
    """Raise FloatingPointError if one of the named numbers has NaN or infinite values.

    what: was going on, with its step. rows: tensors whose first axes are `axes`, to name the first
    row with such a value; they are looked at only then, so a generator may compute them.
    about(*index): more words on that row.
    """
    total = sum(number.detach().sum() for number in numbers.values())
    if math.isfinite(total):  # one look at each step, because on a GPU every look waits
        return
    faults = []
    for name, number in numbers.items():
        wrong = number[~number.isfinite()]
        if len(wrong):
            faults.append(f"{name} is {wrong[0].item()}")
    if not faults:  # finite numbers with a sum that is not
        return
    wrong_rows = []
    for values in rows:
        values = values.reshape(*values.shape[: len(axes)], -1)
        wrong_rows += (~values.isfinite().all(-1)).nonzero().tolist()
    where = "no row alone"
    if wrong_rows:
        first = min(wrong_rows)
        where = ", ".join(f"{axis} {index}" for axis, index in zip(axes, first))
        where += f" ({about(*first)})" if about else ""
    raise FloatingPointError(
        f"{what}: the {' and the '.join(faults)}, from {where}; what was saved before is kept. "
        "Smaller learning rates may help"
    )
