"""The reference recipe, as knobs: the public baseline that the shipped recipe is measured against."""

REFERENCE = dict(
    window_pattern="SSSL", short_window=1 / 2, rope_base=10_000.0, qk_scale=1.0, softcap=15.0, bigram_rows=0, matrix_scale=1.0,
    x0_init=0.1, batch_tokens=2**19, micro_tokens=2**18, embedding_lr=0.6, value_embedding_lr=0.6, head_lr=0.004,
    muon_momentum_steps=300, embedding_decay=0.0, value_embedding_decay=0.0, head_decay=0.0, warmdown=0.5, final_lr=0.0)
