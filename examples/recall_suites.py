"""The experiments of RESULTS.md as rows of `recall.py --suite`: name to fields of `recall.Run`; "lr" is the grid."""

GRID = (1e-3, 2e-3)  # for every model the same
CONTROL = {"innovation_predictor": "random"}
EIGHT = {
    "lr": GRID,
    "seconds": None,
    "steps": 2000,
    "batch_size": 16,
}  # 8 pairs in 64 tokens of random filler, 2.0M tokens
REPEATED = EIGHT | {"task_fields": {"filler": "repeated"}, "eval_lengths": (512, 1024)}
STAGES = ((4, 32), (8, 64), (16, 128))


def sixteen(filler: str, **fields) -> dict:
    """16 pairs behind a lead of filler, learned in stages; 8 heads' worth of other sizes come through `fields`."""
    row = {"task_fields": {"filler": filler, "lead": 16}, "stages": STAGES, "eval_lengths": (512, 2048)}
    return row | {"seconds": None, "steps": 3000, "eval_examples": 256} | fields


SUITES = {
    "eight": {
        "bmojo": EIGHT | {"model": "bmojo", "eval_lengths": (512,)},
        "bmojo-random-choice": EIGHT | {"model": "bmojo", "fields": CONTROL},
        "bmojo-f": EIGHT | {"model": "bmojo-f"},
        "mamba2": EIGHT | {"model": "mamba2"},
        "sliding": EIGHT | {"model": "sliding"},
        "hybrid": EIGHT | {"model": "hybrid"},
        "attention": EIGHT | {"model": "attention"},
    },
    "length": {
        "bmojo": REPEATED | {"model": "bmojo"},
        "bmojo-random-choice": REPEATED | {"model": "bmojo", "fields": CONTROL},
        "mamba2": REPEATED | {"model": "mamba2"},
    },
}
