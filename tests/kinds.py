"""Every projection kind with the lengths it is tested at; a test holds this table against the registry."""

# kind → the k that each grid is tested with.
KINDS: dict[str, dict[tuple[int, int], int]] = {
    "linear": {(7, 5): 11, (13, 13): 7},
    "separable": {(7, 5): 12, (13, 13): 6},
    "avgpool": {(7, 5): 12, (13, 13): 6},
    "identity": {(7, 5): 1, (13, 13): 1},
}
GRIDS = [(7, 5), (13, 13)]
SHARES = ["none", "headwise", "kv", "layerwise"]
