"""Numbers that are none: where NaN or infinity came up first, said in a sentence, before it spoils what was learned."""
import math

import torch


def check(what, numbers, rows=(), axes=("batch row",), about=None):
    """Raise FloatingPointError if one of `numbers`, {name: tensor}, has NaN or infinite values.

    what: was going on, with its step. rows: tensors whose first axes are `axes`; the first row that has such a value is named, and
    about(*index) can say more of it.
    """
    if math.isfinite(sum(x.detach().sum() for x in numbers.values())):  # one look at each step
        return
    odd = [f"{name} is {x.flatten()[~x.isfinite().flatten()][0].item()}" for name, x in numbers.items() if not x.isfinite().all()]
    if odd:
        found = torch.stack([~x.isfinite().reshape(*x.shape[:len(axes)], -1).all(-1) for x in rows]).any(0).nonzero().tolist() if rows else []
        where = ", ".join(f"{name} {i}" for name, i in zip(axes, found[0])) if found else "no row alone"
        more = f" ({about(*found[0])})" if found and about else ""
        raise FloatingPointError(f"{what}: the {' and the '.join(odd)}, from {where}{more}; what was saved before is kept. "
                                 "Smaller learning rates may help")
