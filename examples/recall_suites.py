"""The experiments of RESULTS.md as rows of `recall.py --suite`: name to fields of `recall.Run`; "lr" is the grid.

Budgets are steps, not seconds, so that a row comes out the same on any machine; the results say what CPU time it took. Only
`minute` gives every model the same CPU time.
"""

GRID = (1e-3, 2e-3, 4e-3)  # learning rates, the same for every model
EIGHT = {"lr": GRID, "seconds": None, "steps": 2000}  # 8 pairs in 64 tokens of random filler, 2.0M tokens
ABLATION = EIGHT | {"lr": 2e-3}  # the rate that the grid chose for the whole layer
LEAD = ABLATION | {"task_fields": {"filler": "repeated", "lead": 16}}  # 16 tokens of filler before the evidence
MINUTE = {"lr": (2e-3, 3e-3, 4e-3), "seconds": 60.0, "batch_size": 32}  # of CPU time, whatever that buys a model,
MINUTE |= {"stages": ((4, 32), (8, 64))}  # and first with 4 pairs
REPEATED = EIGHT | {"task_fields": {"filler": "repeated"}, "eval_lengths": (512, 1024)}


def bmojo(base: dict = EIGHT, variation: str | None = None, model: str = "bmojo", **fields) -> dict:
    """A row of a B'MOJO stack with fields of its config."""
    return base | {"model": model, "fields": fields, "variation": variation}


# Mamba2 as it is usually built, twice as wide inside, with as many floats of memory as the B'MOJO stack has
MAMBA2 = {"model": "mamba2", "fields": {"expand": 2, "state_size": 32}}

SWEEP = {f"bmojo-m{size}": bmojo(ABLATION, eidetic_size=size) for size in (4, 8, 16, 32, 48)}


def sixteen(filler: str, steps: int = 8000, **row) -> dict:
    """16 pairs behind 16 tokens of filler, learned in stages."""
    base = {"task_fields": {"filler": filler, "lead": 16}, "stages": ((4, 32), (8, 64), (16, 128))}
    return (
        base | {"lr": GRID, "seconds": None, "steps": steps, "eval_lengths": (512, 2048), "eval_examples": 256} | row
    )


def sixteen_rows(filler: str) -> dict:
    """Equal floats of memory, about 9,000, but for Mamba2, which gets 11,500 and twice the steps."""
    return {
        "bmojo-m32": sixteen(filler, model="bmojo", fields={"eidetic_size": 32}),
        "mamba2": sixteen(filler, steps=16000, model="mamba2", fields={"expand": 2, "state_size": 40}),
        "hybrid": sixteen(filler, model="hybrid", fields={"state_size": 64}),
        "sliding": sixteen(filler, model="sliding", window=32),
    }


def long_rows() -> dict:
    """Those of `sixteen-noise` that learn it, at the learning rates that were best there, tested at up to 256 times the length."""
    rates = {"bmojo-m32": 1e-3, "mamba2": 4e-3, "hybrid": 4e-3}
    rows = sixteen_rows("noise")
    return {
        name: rows[name] | {"lr": rate, "eval_lengths": (2048, 8192, 32768), "eval_examples": 128}
        for name, rate in rates.items()
    }


MAD = {"lr": GRID, "seconds": None, "steps": 1500, "train_examples": 12800}


def half_life_rows() -> dict:
    """A task of MAD in which the same keys come again and again, with innovations that fade; the learning rate of the row without."""
    row = MAD | {"task": "in-context-recall", "model": "bmojo", "hidden_size": 64, "lr": 4e-3}
    fields = [{"mamba_head_dim": 32, "innovation_half_life": tokens} for tokens in (16, 64)]
    return {f"in-context-recall-half-life-{own['innovation_half_life']}": row | {"fields": own} for own in fields}


def mad_rows() -> dict:
    """Four tasks of MAD at two sizes of model, on its 12,800 examples; the larger takes the smaller's learning rate."""
    rows, budget = {}, MAD
    for task in ("in-context-recall", "noisy-recall", "fuzzy-recall", "selective-copying"):
        for hidden in (64, 128):
            for model in ("bmojo", "bmojo-f", "mamba2", "sliding", "attention"):
                rate = GRID if hidden == 64 else f"{task}-64-{model}"
                row = budget | {"task": task, "model": model, "hidden_size": hidden, "lr": rate}
                rows[f"{task}-{hidden}-{model}"] = row | {"fields": {"mamba_head_dim": hidden // 2}}
    return rows


SUITES = {
    "eight": {
        "bmojo": bmojo() | {"eval_lengths": (512,)},
        "bmojo-random-choice": bmojo(innovation_predictor="random"),
        "bmojo-f": bmojo(model="bmojo-f"),
        "bmojo-all": bmojo(model="bmojo-all"),
        "bmojo-all-add-fading-token": bmojo(model="bmojo-all", variation="add-fading-token"),
        "mamba2-expand2-state32": EIGHT | MAMBA2,
        "mamba2": EIGHT | {"model": "mamba2"},
        "mamba2-state64": EIGHT | {"model": "mamba2", "fields": {"state_size": 64}},
        "sliding": EIGHT | {"model": "sliding"},
        "hybrid": EIGHT | {"model": "hybrid"},
        "jamba": EIGHT | {"model": "jamba"},
        "attention": EIGHT | {"model": "attention"},
    },
    "minute": {
        "bmojo": bmojo(MINUTE),
        "bmojo-m32": bmojo(MINUTE, eidetic_size=32),
        "bmojo-m32-random-choice": bmojo(MINUTE, eidetic_size=32, innovation_predictor="random"),
        "mamba2-expand2-state32": MINUTE | MAMBA2,
        "sliding": MINUTE | {"model": "sliding"},
        "hybrid": MINUTE | {"model": "hybrid"},
        "jamba": MINUTE | {"model": "jamba"},
        "attention": MINUTE | {"model": "attention"},
        "bmojo-at-once": bmojo(MINUTE | {"stages": ()}),
        "bmojo-m32-at-once": bmojo(MINUTE | {"stages": ()}, eidetic_size=32),
    },
    "length": {
        "bmojo": bmojo(REPEATED),
        "bmojo-random-choice": bmojo(REPEATED, innovation_predictor="random"),
        "bmojo-half-life-64": bmojo(REPEATED | {"lr": 2e-3}, innovation_half_life=64),  # the rate of the first
        "mamba2-expand2-state32": REPEATED | MAMBA2,
        "mamba2": REPEATED | {"model": "mamba2"},
        "mamba2-state64": REPEATED | {"model": "mamba2", "fields": {"state_size": 64}},
        "hybrid": REPEATED | {"model": "hybrid"},
    },
    "sixteen-repeated": sixteen_rows("repeated"),
    "sixteen-noise": sixteen_rows("noise"),
    "sixteen-noise-long": long_rows(),
    "predictors": {
        **{f"average-{kernel}": bmojo(ABLATION, innovation_kernel=kernel) for kernel in (2, 4, 8, 16)},
        "exponential-8": bmojo(ABLATION, innovation_predictor="exponential"),
        "learnable-8": bmojo(ABLATION, innovation_predictor="learnable"),
        "state-prediction": bmojo(ABLATION, variation="state-prediction"),
        "layer-input-8": bmojo(ABLATION, innovation_signal="layer_input"),
        "cosine-8": bmojo(ABLATION, variation="cosine"),
        "relative-8": bmojo(ABLATION, variation="relative"),
        **{choice: bmojo(ABLATION, innovation_predictor=choice) for choice in ("random", "recent", "oldest")},
    },
    "choices": {
        **{f"chunk-{size}": bmojo(ABLATION, eidetic_chunk_size=size) for size in (2, 4, 8, 16, 32)},
        "position-constant": bmojo(ABLATION, eidetic_position="constant"),
        "position-rank": bmojo(ABLATION, eidetic_position="rank"),
        "untied": bmojo(ABLATION, tie_attn_weights=False),
        "add-fading-token": bmojo(ABLATION, variation="add-fading-token"),
        "bmojo-f-add-fading-token": bmojo(ABLATION, model="bmojo-f", variation="add-fading-token"),
    },
    "lead": {  # the choices where evidence does not come first; where it does, the oldest tokens are the right ones
        "layer-input": bmojo(LEAD, innovation_signal="layer_input"),
        "half-life-64": bmojo(LEAD, innovation_half_life=64),
        **{choice: bmojo(LEAD, innovation_predictor=choice) for choice in ("average", "random", "recent", "oldest")},
    },
    "sweep": SWEEP,
    "fading-state": {f"bmojo-f-state{size}": bmojo(model="bmojo-f", state_size=size) for size in (16, 32, 64)},
    "memory": {
        **{
            f"mamba2-state{size}": EIGHT | {"model": "mamba2", "fields": {"state_size": size}}
            for size in (8, 16, 32, 64)
        },
        **{f"mamba-state{size}": EIGHT | {"model": "mamba", "fields": {"state_size": size}} for size in (8, 32)},
        **{f"sliding-w{size}": EIGHT | {"model": "sliding", "window": size} for size in (8, 16, 32)},
        **{f"hybrid-w{size}": EIGHT | {"model": "hybrid", "window": size} for size in (8, 16, 32)},
        **{f"bmojo-f-w{size}": EIGHT | {"model": "bmojo-f", "window": size} for size in (8, 16)},
        "attention": EIGHT | {"model": "attention"},
        "jamba": EIGHT | {"model": "jamba"},
        **SWEEP,
    },
    "mad": mad_rows(),
    "half-life": half_life_rows(),
}
