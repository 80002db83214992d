"""Shapes of the tests' drafters."""

SHAPES = {
    "dflash": {"num_layers": 2, "block_size": 16},
    # The draft vocabulary is small enough to miss tokens of the text.
    "eagle3": {"draft_length": 15, "draft_vocab_size": 150},
    "dspark": {"num_layers": 1, "block_size": 15, "markov_rank": 16},
    "dflash2": {"num_layers": 1, "block_size": 16, "selector_rank": 16},
}
