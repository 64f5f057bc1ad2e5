"""An advantage with every mistake that is easy to make. `grpoforge plugins check broken_advantage.py` names them all:

- `float64`: it computes in float32.
- `leaves_data_alone`: it writes 0 over the NaN of the table that it was given.
- `row_order`: its baseline is the first completion of the group.
- `unscored_row_is_0`: so a row that nobody scored counts as a reward of 0, and is punished for it.
- `unscored_rows_do_not_count`: and widens the spread that the others are divided by.
- `equal_totals_get_0`: equal totals are 0 / 0.
- `batch_of_one`: so is a single completion.
- `invariances`: it declares that groups sum to 0.
"""

from grpoforge import hookimpl


def hasty(rewards, weights):
    """The total minus that of the group's first completion, over the standard deviation."""
    total = (rewards.nan_to_num_(nan=0.0) * weights).sum(dim=2).float()
    return (total - total[:, :1]) / total.std(dim=1, correction=0, keepdim=True)


hasty.invariances = ("shift", "group_sum")


@hookimpl
def register_advantages(register):
    register("hasty", hasty)
