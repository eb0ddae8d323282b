"""Reward: the share of letters and digits in the reply, which a tiny model learns within a few steps."""


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    """verl's custom reward function; `acc` becomes `val-core/tiny/acc/mean@1`."""
    good = sum(c.isascii() and c.isalnum() for c in solution_str)
    share = good / max(len(solution_str), 1)
    return {"score": share, "acc": share}
