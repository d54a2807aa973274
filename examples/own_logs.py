"""The critical batch from logs you have: a line a run, with the steps it took to the loss you care about.

Here three runs of scikit-learn's digits at each batch size, at the rate that took the fewest steps to train loss 0.3.

python examples/own_logs.py
pybatch fit examples/own_logs.csv --html page.html      # the same from the command line
"""

from pathlib import Path

import pybatch


def main() -> None:
    """Fit the steps against the batch size, and print what follows."""
    fit = pybatch.fit_steps_csv(Path(__file__).with_name("own_logs.csv"))
    print(f"S(B) is {fit.model}: at least {fit.s_min:.0f} steps")
    print(f"critical batch {fit.critical_batch:.0f} [{fit.low:.0f}, {fit.high:.0f}]: twice the fewest examples")
    print(f"20 % more examples than the fewest at {fit.b20:.0f}; past {fit.b_stag:.0f} doubling saves under a tenth")
    for note in fit.notes:
        print(f"note: {note.text}")


if __name__ == "__main__":
    main()
